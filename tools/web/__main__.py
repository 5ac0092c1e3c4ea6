"""A page for a trained model: an image and expressions in, masks out.

    python -m tools.web --resume CKPT [--host 127.0.0.1] [--port 7860]
    python -m tools.web --pretrained FOLDER_OR_HUB_NAME

Only this machine can open it unless --host says otherwise; docs/page.md. Needs Gradio:
pip install -r requirements-web.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils
from args import Parser, add_model_flags, take_from_checkpoint
from lib.errors import InputError
from lib.predictor import Predictor
from lib.runtime import AMP
from refer.images import MAX_PIXELS
from tools.trained import given
from tools.web.examples import choose_examples


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = Parser("python -m tools.web", description="A page for a trained model.")
    add_model_flags(p)
    take_from_checkpoint(p)
    p.add_argument("--resume", metavar="FILE", help="checkpoint")
    p.add_argument("--pretrained", metavar="SOURCE", help="folder or hub name, instead of --resume")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: all)")
    p.add_argument("--port", type=int, default=7860, help="0: a free one")
    p.add_argument(
        "--examples",
        default="",
        metavar="PATH",
        help="folder of images, or a list as of demo_inference.py --list (default: photos, or "
        "generated scenes for a model of RefShapes)",
    )
    p.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="upper limit of an image's")
    p.add_argument("--device", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    p.add_argument("--amp", default="off", choices=AMP, help="mixed precision")
    args = p.parse_args(argv)
    if args.resume and args.pretrained:
        raise InputError("give only one of --resume and --pretrained")
    if not args.resume and not args.pretrained:
        raise InputError("give --resume FILE, or --pretrained FOLDER_OR_HUB_NAME")
    if args.max_pixels < 1:
        raise InputError(f"--max_pixels {args.max_pixels}: must be above 0")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: give 1 to 65535, or 0 for a free one")
    if not args.host.strip():
        raise InputError('--host "": give an address, like 127.0.0.1')
    return args


def find_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: nothing can listen there.
    """
    try:
        for address in (host, "127.0.0.1"):  # Gradio wants to have it there, too
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server((address, port), family=family) as server:
                port = server.getsockname()[1]
    except (OSError, UnicodeError) as e:
        reason = str(getattr(e, "strerror", None) or e).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port}: {reason}; give another") from e
    return port


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page that the command line asks for."""
    args = parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio: make page, or pip install -r requirements-web.txt")
    port = find_port(args.host, args.port)
    on: dict[str, Any] = {"device": args.device, "amp": args.amp}
    on |= {"flags": given(args)}
    if args.resume:
        predictor = Predictor.from_checkpoint(args.resume, **on)
    else:
        predictor = Predictor.from_pretrained(args.pretrained, **on)
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read at import
        examples = choose_examples(
            args.examples, predictor.tokenizer, folder / "scenes", args.max_pixels
        )
        from tools.web.page import build, serve

        serve(build(predictor, examples, folder, args.max_pixels), folder, args.host, port)
    # Not sys.exit: the model may still be running in a thread, which would end in an abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    utils.run_script(main)
