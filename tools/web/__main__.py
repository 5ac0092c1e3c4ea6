"""A page for a trained model: an image and expressions in, masks out.

    python -m tools.web --resume CKPT [--host 127.0.0.1] [--port 7860]
    python -m tools.web --pretrained FOLDER_OR_HUB_NAME

Only this machine can open it unless --host says otherwise; docs/page.md. Needs Gradio:
pip install -r requirements-web.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import utils
from args import Parser
from lib.errors import InputError
from lib.predictor import Predictor
from lib.runtime import AMP
from refer.images import MAX_PIXELS
from tools.web.examples import choose_examples


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        InputError: naming the flag and what it takes.
    """
    p = Parser("python -m tools.web", description="A page for a trained model.")
    p.add_argument("--resume", metavar="FILE", help="checkpoint")
    p.add_argument("--pretrained", metavar="SOURCE", help="folder or hub name, instead of --resume")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: all)")
    p.add_argument("--port", type=int, default=7860)
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
    if bool(args.resume) == bool(args.pretrained):
        raise InputError("give --resume FILE, or --pretrained FOLDER_OR_HUB_NAME")
    if args.max_pixels < 1:
        raise InputError(f"--max_pixels {args.max_pixels}: must be above 0")
    return args


def check_address(host: str, port: int) -> None:
    """Raise an InputError where nothing can listen on an address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, UnicodeError) as e:
        reason = str(getattr(e, "strerror", None) or e).partition(" (while")[0]
        raise InputError(f"--host {host} --port {port}: {reason}; give another") from e


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page that the command line asks for."""
    args = parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio: make page, or pip install -r requirements-web.txt")
    check_address(args.host, args.port)
    if args.resume:
        predictor = Predictor.from_checkpoint(args.resume, args.device, args.amp)
    else:
        predictor = Predictor.from_pretrained(args.pretrained, device=args.device, amp=args.amp)
    with tempfile.TemporaryDirectory(prefix="page-") as name:
        folder = Path(name).resolve()
        examples = choose_examples(
            args.examples, predictor.tokenizer, folder / "scenes", args.max_pixels
        )
        from tools.web.page import build, serve

        serve(build(predictor, examples, folder, args.max_pixels), folder, args.host, args.port)


if __name__ == "__main__":
    utils.run_script(main)
