"""The page, with Gradio: what is where, and what may be asked of the server."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from gradio.exceptions import InvalidPathError
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.errors import InputError
from lib.predictor import Predictor
from tools.web import answers
from tools.web.answers import Result
from tools.web.examples import Example

MAX_FILE = "100mb"  # of an upload
KEPT = 3600  # seconds that a visitor's files and results are kept, at least
VISITORS = 64  # whose results are kept
NO_MASKS = "No masks yet, or older than an hour: press Segment."
NO_UPLOAD = "No such upload, or older than an hour: give the image again."
WAITING = 32  # visitors in the queue
STYLE = """
.gradio-container {max-width: 1240px !important}
#notes p {margin: 0 0 .4em; padding: .5em .8em; border-left: 3px solid #e90080;
  background: var(--background-fill-secondary); overflow-wrap: anywhere}
.gallery-item, .gallery-item button {aspect-ratio: auto !important; height: auto !important}
.gallery-item img {height: auto !important; max-height: 560px}
.gallery-item .caption-label {position: static !important; max-width: none; border: 0;
  text-align: left; white-space: pre-line; max-height: 8em; overflow: auto}
.grid-wrap {max-height: none !important; overflow: visible !important}
#threshold input[type=number] {display: none}
@media (max-width: 640px) {.grid-container {grid-template-columns: 1fr !important}}
"""
# All that the page asks the server for. Gradio can do more, such as fetching other addresses.
ASKED = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static)/.+|"
    r"/gradio_api/(upload|upload_progress|queue/join|queue/data|heartbeat/\w+|startup-events|"
    r"cancel|run/predict)"  # the last loads an example; Gradio refuses it to events with a queue
)


class Gate:
    """ASGI middleware that answers 404 to what the page does not ask for.

    Args:
        app: what comes behind it.
        folder: the only one whose files are sent.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.files = app, f"/gradio_api/file={folder}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        path = scope.get("path", "")
        known = ASKED.fullmatch(path) or path.startswith(self.files)
        if scope["type"] == "http" and (not known or ".." in path):
            await PlainTextResponse("not found", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


_check_allowed = processing_utils._check_allowed


def _check_uploaded(path: str | Path, uploaded: bool) -> None:
    """Gradio's check of a file, without folders, which it would later delete as files."""
    try:
        if uploaded and not Path(path).is_file():
            raise InvalidPathError
        _check_allowed(path, uploaded)
    except InvalidPathError:
        raise gr.Error(NO_UPLOAD, print_exception=False) from None


async def _fetch_nothing(url: str, *_: Any, **__: Any) -> str:
    raise gr.Error("addresses are not fetched: upload the image", print_exception=False)


def build(
    predictor: Predictor, examples: Sequence[Example], folder: Path, max_pixels: int
) -> gr.Blocks:
    """The page of a model.

    Args:
        predictor: the model.
        examples: images and expressions that a visitor may choose.
        folder: for all files of visitors, GRADIO_TEMP_DIR; deleted by the caller.
        max_pixels: upper limit of an image's pixels.
    """
    processing_utils._check_allowed = _check_uploaded  # type: ignore[assignment]
    # Where a visitor names an image by its address, Gradio would fetch it.
    processing_utils.async_ssrf_protected_download = _fetch_nothing

    def segment(
        file: str | None,
        text: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio finds it there
    ) -> list[Any]:
        def bar(expressions: Sequence[str]) -> Any:
            return progress.tqdm(expressions, desc="expressions")

        try:
            result = answers.predict(predictor, file, text, max_pixels, bar)
        except InputError as e:
            return [None, _notes([str(e)]), gr.Dropdown(choices=[], value=None)]
        choices = gr.Dropdown(choices=list(result.expressions), value=result.expressions[0])
        return [result, "", choices]

    def clear(result: Result | None = None, file: str | None = None) -> list[Any]:
        """Remove what was found, unless it is of this image: a press may have come before."""
        if result is not None and file is not None and Path(file) == result.file:
            return [gr.skip()] * len(results)
        return [*[None] * 5, "", gr.Dropdown(choices=[], value=None)]

    def finish(result: Result | None, file: str | None, threshold: float) -> list[Any]:
        """Draw what the model found, unless the image was replaced meanwhile."""
        if result is None:
            return [*[None] * 5, gr.skip(), gr.skip()]
        if file is None or Path(file) != result.file:
            return clear()
        masks, files, written, _ = draw(result, threshold)
        maps = answers.draw_probabilities(result)
        return [gr.skip(), masks, files, maps, None, written, gr.skip()]

    def draw(result: Result | None, threshold: float) -> list[Any]:
        label = gr.Slider(label=_label(threshold))
        if result is None:
            return [None, None, _notes([NO_MASKS]), label]
        shown, written = answers.draw_masks(result, threshold), answers.notes(result, threshold)
        return [shown, None, _notes(written), label]

    def write(result: Result | None, threshold: float) -> tuple[Any, Any]:
        if result is None:
            return None, _notes([NO_MASKS])
        to = Path(tempfile.mkdtemp(dir=folder))
        return list(map(str, answers.write_files(result, threshold, to))), gr.skip()

    def attend(result: Result | None, index: int | None) -> tuple[Any, Any]:
        if result is None or index is None:
            return None, _notes([NO_MASKS])
        try:
            return answers.draw_attention(predictor, result, index, max_pixels), gr.skip()
        except InputError as e:
            return None, _notes([str(e)])

    with gr.Blocks(
        title="Referring segmentation", analytics_enabled=False, delete_cache=(KEPT // 4, KEPT)
    ) as page:
        state = gr.State(time_to_live=KEPT)
        gr.Markdown("# Referring segmentation\nAn image and expressions in, masks out.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = _image_input(folder)
                text = gr.Textbox(
                    label="Expressions",
                    info="One a line. Shift+Enter segments.",
                    placeholder="the dog on the left",
                    lines=3,
                    max_lines=answers.MAX_EXPRESSIONS,
                    max_length=answers.MAX_TEXT,
                    elem_id="expressions",
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
                notes = gr.HTML(elem_id="notes")
            with gr.Column(scale=3, min_width=320):
                threshold = gr.Slider(
                    0.01,
                    0.99,
                    0.5,
                    step=0.01,
                    label=_label(0.5),
                    info="0.5 is the model's own mask. Moving it does not run the model.",
                    elem_id="threshold",
                )
                with gr.Tab("Masks"):
                    masks = _gallery("masks")
                with gr.Tab("Probability"):
                    maps = _gallery("maps")
                with gr.Tab("Attention"):
                    gr.Markdown("Each pixel's attention to each word, at every stage.")
                    which = gr.Dropdown(choices=[], type="index", label="Expression")
                    show = gr.Button("Show attention", elem_id="show-attention")
                    figure = gr.Image(
                        show_label=False,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="attention",
                    )
                with gr.Tab("Files"):
                    gr.Markdown(
                        "Masks at the threshold, in the image's own size: PNG and COCO RLE."
                    )
                    make = gr.Button("Write files", elem_id="write-files")
                    files = gr.File(label="Files", interactive=False, elem_id="files")
        told = any(lines for _, lines in examples)
        samples = _examples(examples, [image, text]) if examples else None
        # Of presses while one is being answered, the last one counts.
        common: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last"}
        # The model runs for one visitor at a time; redrawing does not wait for it.
        on_model = common | {"concurrency_limit": 1, "concurrency_id": "model"}
        other = common | {"concurrency_limit": 4}
        results = [state, masks, files, maps, figure, notes, which]
        asking = [button.click, text.submit]
        if samples:
            cleared = samples.then(clear, [state, image], results, show_progress="hidden", **other)
            asking += [cleared.then] if told else []
        for event in asking:
            event(
                segment, [image, text], [state, notes, which], show_progress_on=masks, **on_model
            ).then(finish, [state, image, threshold], results, show_progress="hidden", **other)
        changed = [image.upload, image.clear]
        gr.on(changed, clear, [state, image], results, show_progress="hidden", **other)
        threshold.change(
            draw,
            [state, threshold],
            [masks, files, notes, threshold],
            show_progress="hidden",
            **other,
        )
        show.click(attend, [state, which], [figure, notes], **on_model)
        make.click(write, [state, threshold], [files, notes], **other)
    page.queue(max_size=WAITING, api_open=False)
    return page


def _image_input(folder: Path) -> gr.Image:
    """The upload; as a path, so that images are opened and limited as everywhere else."""

    def path_of(payload: Any) -> str | None:
        path = payload and payload.path
        real = Path(path or folder).resolve()
        if path and not (real.is_relative_to(folder) and real.is_file()):  # see _check_uploaded
            raise gr.Error(NO_UPLOAD, print_exception=False)
        return path

    image = gr.Image(
        label="Image",
        sources=["upload", "clipboard"],
        type="filepath",
        height=260,
        buttons=[],
        elem_id="image",
    )
    # Its own would open the file, in any of PIL's formats.
    image.preprocess = path_of  # type: ignore[method-assign]
    return image


def _label(threshold: float) -> str:
    """The slider's: its own box for numbers takes ones that it does not pass on."""
    return f"Threshold of the probability: {threshold:.2f}"


def _gallery(name: str) -> gr.Gallery:
    return gr.Gallery(
        show_label=False,
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def _examples(examples: Sequence[Example], inputs: list[Any]) -> Any:
    """A row of examples; returns the event that fills one in."""
    return gr.Examples(
        [[str(path), "\n".join(lines)] for path, lines in examples],
        inputs,
        cache_examples=False,
        visible_columns=[0],
        elem_id="examples",
        api_visibility="private",
    ).load_input_event


def _notes(lines: Sequence[str]) -> str:
    """HTML of messages; expressions in them are a visitor's."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def serve(page: gr.Blocks, folder: Path, host: str, port: int) -> None:
    """Serve a page until it is interrupted.

    Args:
        page: of :func:`build`.
        folder: as there.
        host, port: free, see :mod:`tools.web.__main__`.
    """
    own = ["localhost", "127.0.0.1", "::1", host]
    no_proxy = ",".join([*own, *filter(None, [os.environ.get("NO_PROXY")])])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = no_proxy  # Gradio asks itself
    # Another name of this machine may be a website's, whose scripts would then reach the page.
    alone = host.startswith("127.") or host in own[:3]
    names = [*own, "[::1]"] if alone else ["*"]
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[],
        max_file_size=MAX_FILE,
        state_session_capacity=VISITORS,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css=STYLE,
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
                Middleware(Gate, folder=folder),
            ]
        },
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the files are deleted
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    address = f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"
    if host in ("0.0.0.0", "::"):
        address += f" or, from other machines, http://{socket.gethostname()}:{port}/"
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        page.close(verbose=False)
