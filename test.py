"""Evaluate a checkpoint: all expressions of all objects of one or more splits.

python test.py --split val --resume ./checkpoints/refcoco.pth --refer_data_root DATA
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import utils
from args import (
    OF_DATA,
    OF_INPUT,
    dataset_options,
    parse_test,
    protocol_of,
    refer_options,
    select,
)
from data.dataset_refer_bert import ReferDataset
from lib.evaluation import tables
from lib.evaluation.evaluator import EvalConfig
from lib.evaluation.predictions import PredictionsFile
from lib.evaluation.protocol import warning
from lib.evaluation.results import tabulate, write_results
from lib.evaluation.summary import Summary, evaluate_split
from refer.refer import REFER
from tools.trained import name_outputs, open_model
from utils import log


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_test(argv)
    info = utils.init_distributed(args.device, args.local_rank)
    utils.setup_logging(None, info.rank)
    trained = open_model(args, info.device, OF_INPUT + OF_DATA)
    name_outputs(args)
    refer = REFER(**refer_options(args))
    datasets = {
        split: ReferDataset(refer, split, trained.tokenizer, **dataset_options(args))
        for split in args.splits
    }
    for dataset in datasets.values():
        dataset.check_images()
    if info.is_main:
        utils.make_folder(Path(args.results).parent)
    protocol = protocol_of(args)
    config = select(EvalConfig, args)
    seed = args.seed if args.val_expressions == "one" else None
    seen_images = trained.model.seen_images
    summaries: dict[str, Summary] = {}
    with PredictionsFile(args.predictions, protocol.label, info) as predictions:
        for split, dataset in datasets.items():
            log.info("%s %s: %d samples", args.dataset, split, len(dataset))
            if not protocol.is_standard:
                log.info("%s", warning(protocol.label))
            summaries[split] = evaluate_split(
                trained.model,
                dataset,
                config,
                info,
                one_expression_seed=seed,
                control=args.control,
                on_prediction=predictions.writer(dataset),
            )
            results = tabulate(args.model, protocol, datasets, summaries, seen_images)
            if info.is_main:  # before anything is printed: the terminal may be gone
                facts = (protocol, summaries, vars(args), str(info.device))
                written = write_results(Path(args.results), results, *facts)
            log.info("%s", summaries[split].rows["all"].release_text())
    log.info("%s", tables.as_text(results))
    for path in written if info.is_main else []:
        log.info("written: %s", path)


if __name__ == "__main__":
    utils.run_script(main)
