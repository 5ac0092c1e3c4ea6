"""The download command against a server that misbehaves."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import shutil
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib.errors import InputError
from refer import download, fetch
from refer.datasets import DATASETS
from refer.fetch import FetchError, Patience, Remote
from tests.refer_files import CC0_ROOT

PATIENCE = Patience(tries=4, pause=0.0, silence=5.0)
IMAGES = CC0_ROOT / "images/mscoco/images/train2014"
HABIT = "images/mscoco/images/train2014"
BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; the next of `server.moods` of a path decides how."""

    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        moods = self.server.moods.get(self.path, [])
        try:
            (moods.pop(0) if moods else good)(self)
        except OSError:  # the client has gone
            self.close_connection = True

    @property
    def body(self) -> bytes:
        return self.server.files.get(self.path, b"")

    def answer(self, code: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


Mood = Callable[[Handler], None]


class Server(http.server.ThreadingHTTPServer):
    """A local server.

    Attributes:
        files: content by path.
        moods: how the next requests of a path are answered; properly after that.
        seen: path and headers of all requests.
    """

    daemon_threads = True
    files: dict[str, bytes]
    moods: dict[str, list[Mood]]
    seen: list[tuple[str, dict[str, str]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


def good(h: Handler) -> None:
    """As a server should: ranges, a version, a size."""
    if h.path not in h.server.files:
        h.answer(404)
        return
    tag = f'"{hashlib.md5(h.body).hexdigest()}"'
    asked = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", ""))
    start = int(asked[1]) if asked and h.headers.get("If-Range", tag) == tag else 0
    if start and start >= len(h.body):
        h.answer(416, Content_Range=f"bytes */{len(h.body)}")
    elif start:
        place = f"bytes {start}-{len(h.body) - 1}/{len(h.body)}"
        h.answer(206, h.body[start:], Content_Range=place, ETag=tag)
    else:
        h.answer(200, h.body, ETag=tag)


def cut(at: int, **headers: object) -> Mood:
    """Properly, but the connection breaks after so many bytes of the body."""

    def mood(h: Handler) -> None:
        whole, h.wfile = h.wfile, io.BytesIO()  # type: ignore[assignment]
        good(h)
        head, _, body = h.wfile.getvalue().partition(b"\r\n\r\n")
        h.wfile = whole
        h.wfile.write(head + b"\r\n\r\n" + body[:at])
        h.close_connection = True

    return mood


def says(code: int, body: bytes = b"", **headers: object) -> Mood:
    return lambda h: h.answer(code, body, **headers)


def no_ranges(h: Handler) -> None:
    h.answer(200, h.body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.moods, server.seen = {"/f": BODY}, {}, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def get(server: Server, path: Path, patience: Patience = PATIENCE, **facts: Any) -> None:
    facts = {"most": 1 << 20, "remedy": "try another"} | facts
    fetch.fetch(Remote(server.url + "/f", **facts), path, patience)


def no_leftovers(path: Path) -> bool:
    return list(path.parent.glob("*.partial*")) == []


# ---- a file ----


@pytest.mark.parametrize(
    "moods",
    [
        [],
        [cut(0)],
        [cut(5000), cut(2000)],
        [cut(5000), no_ranges],
        [cut(5000), cut(100), no_ranges],
        [cut(5000), says(206, BODY[4000:], Content_Range="bytes 4000-10239/10240")],
        [cut(5000), says(206, BODY[5000:], Content_Range="rubbish")],
        [cut(5000), says(206, b"z" * 5240, Content_Range="bytes 5000-10239/10240", ETag='"n"')],
        [cut(5000), says(206, b"z" * 5241, Content_Range="bytes 5000-10240/10241")],
        [cut(5000), says(416)],
        [says(200, BODY[:700], Content_Length=None)],
        [says(503, Retry_After=0), says(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
        [says(500, b"down"), says(502), says(503)],
        [says(302, Location="/f")],
        [says(200, BODY, Content_Length=None)],
        [says(204)],
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["digest", "size"])
def test_it_arrives_whole(server: Server, tmp_path: Path, moods: list[Mood], known: bool) -> None:
    path = tmp_path / "new" / "f"
    server.moods["/f"] = list(moods)
    get(server, path, size=len(BODY), digest=digest(BODY) if known else "")
    assert path.read_bytes() == BODY
    assert no_leftovers(path)
    assert server.moods["/f"] == []


def test_only_the_rest_is_asked_for(server: Server, tmp_path: Path) -> None:
    server.moods["/f"] = [cut(5000), cut(1000)]
    get(server, tmp_path / "f")
    asked = [headers.get("Range") for _, headers in server.seen]
    assert asked == [None, "bytes=5000-", "bytes=6000-"]
    assert [headers.get("If-Range", "")[:1] for _, headers in server.seen] == ["", '"', '"']
    assert "lavt" in server.seen[0][1]["User-Agent"]
    assert server.seen[0][1]["Accept-Encoding"] == "identity"


def test_a_part_of_unknown_version_is_not_continued(server: Server, tmp_path: Path) -> None:
    server.moods["/f"] = [says(200, b"z" * 700, Content_Length=None)]
    get(server, tmp_path / "f", size=len(BODY))
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        (says(404), "404"),
        (says(403), "403"),
        (says(503, Retry_After=90000), "in 1500 minutes"),
        (says(302, Location="file:///etc/passwd"), "not allowed"),
        (says(302, Location="ftp://127.0.0.1/f"), "ftp"),
        (says(302, Location="/f"), "loop"),
        (says(302, Location="http://[bad/"), "address"),
        (says(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8"), "web page"),
        (says(200, BODY, Content_Encoding="gzip"), "an encoded form"),
        (
            says(200, BODY, Transfer_Encoding="gzip, chunked", Content_Length=None),
            "an encoded form",
        ),
        (says(200, BODY + b"x"), "10241 bytes instead of 10240"),
        (says(200, BODY[1:]), "10239 bytes instead of 10240"),
        (says(200, BODY * 3, Content_Length=None), "more than the 10240 bytes"),
        (says(200, b"z" * len(BODY)), "checksum is sha256:"),
        (cut(0), "after 0 of 10240 bytes; given up after 4 tries"),
        (says(500), "busy"),
        (says(200, BODY, Content_Length=20000), "20000"),
    ],
)
def test_one_line_tells_what_is_wrong(
    server: Server, tmp_path: Path, mood: Mood, words: str
) -> None:
    server.moods["/f"] = [mood] * 20
    with pytest.raises(FetchError, match=re.escape(words)) as caught:
        get(server, tmp_path / "f", size=len(BODY), digest=digest(BODY))
    message = str(caught.value)
    assert server.url in message
    assert "try another" in message
    assert not (tmp_path / "f").exists()
    assert no_leftovers(tmp_path / "f") or "of 10240" in message


def test_an_endless_body_ends(server: Server, tmp_path: Path) -> None:
    def endless(h: Handler) -> None:
        h.answer(200, Content_Length=None)
        while True:
            h.wfile.write(b"0" * 65536)

    server.moods["/f"] = [endless]
    with pytest.raises(FetchError, match="more than the 1048576 bytes"):
        get(server, tmp_path / "f")
    assert no_leftovers(tmp_path / "f")


def test_nothing_and_too_little_are_cut(server: Server, tmp_path: Path) -> None:
    def silent(h: Handler) -> None:
        time.sleep(1)

    def trickle(h: Handler) -> None:
        h.answer(200, Content_Length=len(BODY))
        for i in range(1000):
            h.wfile.write(BODY[i : i + 1])
            time.sleep(0.01)

    server.moods["/f"] = [silent, trickle]
    began = time.monotonic()
    get(server, tmp_path / "f", replace(PATIENCE, silence=0.2, window=0.1, least=1000))
    assert (tmp_path / "f").read_bytes() == BODY
    assert time.monotonic() - began < 3


def test_no_server(tmp_path: Path) -> None:
    remote = Remote("http://127.0.0.1:9/f", "try another", 1000)
    with pytest.raises(FetchError, match=r"no answer \(.*refused.*after 4 tries: try another"):
        fetch.fetch(remote, tmp_path / "f", PATIENCE)


def test_progress_renews_the_tries(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "GROWTH", 1000)
    server.moods["/f"] = [cut(1000)] * 9
    get(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_pauses_grow_and_have_an_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.moods["/f"] = [says(503)] * 5 + [says(503, Retry_After=120)]
    get(server, tmp_path / "f", Patience(tries=7, pause=1.0, longest=4.0))
    for pause, most in zip(slept, [1, 2, 4, 4, 4], strict=False):
        assert most / 2 <= pause <= most
    assert slept[5:] == [120]


def interrupted(server: Server, path: Path, **facts: Any) -> None:
    """A first run that ends after 5000 bytes."""
    server.moods["/f"] = [cut(5000), *[cut(0)] * 3]
    with pytest.raises(FetchError):
        get(server, path, **facts)
    assert path.with_name("f.partial").read_bytes() == BODY[:5000]
    server.seen.clear()


def test_the_next_run_resumes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "NOTED", 1)
    interrupted(server, tmp_path / "f")
    get(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [headers["Range"] for _, headers in server.seen] == ["bytes=5000-"]
    assert no_leftovers(tmp_path / "f")


@pytest.mark.parametrize("what", ["changed", "no note", "other note", "damaged note", "longer"])
def test_the_next_run_starts_anew_if_it_has_to(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(fetch, "NOTED", 1)
    interrupted(server, tmp_path / "f")
    note = tmp_path / "f.partial.json"
    if what == "changed":
        server.files["/f"] = BODY[::-1]
    elif what == "no note":
        note.unlink()
    elif what == "longer":
        (tmp_path / "f.partial").write_bytes(BODY * 2)
    else:
        note.write_text(json.dumps({"url": "http://other/f"}) if what == "other note" else "[1")
    get(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"]
    assert no_leftovers(tmp_path / "f")


def test_joined_parts_with_a_wrong_checksum_are_fetched_anew(
    server: Server, tmp_path: Path
) -> None:
    part = says(206, b"z" * 5240, Content_Range="bytes 5000-10239/10240")
    server.moods["/f"] = [cut(5000), part]
    get(server, tmp_path / "f", digest=digest(BODY))
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="no room"):
        get(server, tmp_path / "f")
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "f.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*f: No space left.*it resumes"):
        get(server, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_threads_end_with_the_first_error() -> None:
    done: list[int] = []

    def work(i: int) -> int:
        if i == 3:
            raise InputError("full")
        done.append(i)
        return i

    with pytest.raises(InputError, match="full"):
        list(fetch.in_threads(work, range(1000), 1))
    assert sorted(fetch.in_threads(lambda i: i, range(20), 4)) == list(range(20))


# ---- zips ----


def make_zip(path: Path, members: dict[str, bytes], **info: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            for key, value in info.items():
                setattr(member, key, value)
            z.writestr(member, data)
    return path


def test_names_of_members_are_no_paths(tmp_path: Path) -> None:
    names = ["../a.jpg", "/b.jpg", "x/../../c.jpg", "C:\\d.jpg", "e.jpg", "x/e.jpg", "x/"]
    archive = make_zip(tmp_path / "z.zip", {name: name.encode() for name in names})
    out = tmp_path / "out"
    asked: list[str] = []

    def target(name: str) -> Path | None:
        asked.append(name)
        return out / "e.jpg" if name.endswith("e.jpg") else None

    assert fetch.unzip(archive, target, 1000, 1000) == [out / "e.jpg"]
    assert (out / "e.jpg").read_bytes() == b"e.jpg"
    assert {p.name for p in tmp_path.rglob("*")} == {"z.zip", "out", "e.jpg"}


@pytest.mark.parametrize(
    ("info", "most", "words"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, 10**6, "is a link"),
        ({}, 9999, "of more than"),
        ({}, 10**5, "unpacked, the upper limit"),
    ],
)
def test_links_and_bombs(tmp_path: Path, info: dict[str, Any], most: int, words: str) -> None:
    archive = make_zip(tmp_path / "z.zip", {"a": bytes(10_000), "b": bytes(10_000)}, **info)
    with pytest.raises(InputError, match=words):
        fetch.unzip(archive, lambda name: tmp_path / "out" / name, most, 15_000)
    assert not (tmp_path / "out").exists()


def test_damaged_zips(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "z.zip", {"a": bytes(range(256)) * 9})
    data = bytearray(archive.read_bytes())
    for at in range(0, len(data), 7):
        wrong = data.copy()
        wrong[at] ^= 0xFF
        archive.write_bytes(wrong)
        try:
            fetch.unzip(archive, lambda name: tmp_path / "out" / "a", 10**6, 10**6)
        except InputError as error:
            message = str(error)
        else:  # the local header is not all used
            message = str(archive)
            assert (tmp_path / "out" / "a").read_bytes() == bytes(range(256)) * 9
        assert str(archive) in message
        assert not list(tmp_path.rglob("*.partial"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# ---- the command ----


def annotations(dataset: str, folder: str = "{}/") -> bytes:
    """A zip as UNC's, of the small dataset."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for file in sorted((CC0_ROOT / dataset).iterdir()):
            z.write(file, folder.format(dataset) + file.name)
        z.writestr("../../evil.txt", "evil")
        z.writestr(f"{dataset}/instances.json.txt", "not wanted")
    return buffer.getvalue()


@pytest.fixture
def mirror(server: Server) -> Server:
    """A server with the small datasets and their images."""
    for dataset in ("refcoco", "refcoco+", "refcocog"):
        server.files[f"/{dataset}.zip"] = annotations(dataset)
    for file in IMAGES.iterdir():
        server.files[f"/coco/train2014/{file.name}"] = file.read_bytes()
    return server


def command(server: Server, root: Path, *words: str, checksum: bool = False) -> int:
    """Run it; return the exit code."""
    hosts = ["--mirror", server.url, "--image_mirror", f"{server.url}/coco/"]
    flags = [*hosts, "--root", str(root), *([] if checksum else ["--skip_checksum"])]
    try:
        download.main([*words, *flags], PATIENCE)
    except SystemExit as end:
        return int(str(end.code))
    return 0


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def needed_names() -> list[str]:
    refer = download.CheckedREFER(CC0_ROOT, "refcoco", "unc")
    return [refer.Imgs[ref["image_id"]]["file_name"] for ref in refer.sound]


def test_datasets_arrive(
    mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "a" / "data"
    mirror.moods["/refcoco.zip"] = [cut(2000), says(503)]
    mirror.moods[f"/coco/train2014/{needed_names()[0]}"] = [cut(99), says(200, b"no image")]
    assert command(mirror, root, "refcoco", "refcocog", "refcoco", "refcoco+") == 0
    found = files(root)
    assert found >= {f"refcoco/{n}" for n in ("instances.json", "refs(unc).p")}
    assert {name.split("/")[0] for name in found} == {"images", "refcoco", "refcoco+", "refcocog"}
    assert not [name for name in found if not name.endswith((".jpg", ".p", "instances.json"))]
    for name in found:
        assert (root / name).read_bytes() == (CC0_ROOT / name).read_bytes()
    out = capsys.readouterr().out
    for name in ("refcoco(unc)", "refcoco+(unc)", "refcocog(umd)"):
        assert f"{name} is sound" in out

    mirror.seen.clear()  # all is there: nothing is asked for
    assert command(mirror, root, "refcoco", "refcocog", "refcoco+") == 0
    assert mirror.seen == []


@pytest.mark.parametrize("habit", [HABIT, "images/train2014"])
def test_what_the_user_has_is_kept(mirror: Server, tmp_path: Path, habit: str) -> None:
    shutil.copytree(CC0_ROOT / "refcoco", tmp_path / "refcoco")
    names = sorted(set(needed_names()))
    (tmp_path / habit).mkdir(parents=True)
    (tmp_path / habit / names[0]).write_bytes(b"")
    with Image.open(IMAGES / names[1]) as image:
        image.save(tmp_path / habit / names[1], quality=30)
    mine = (tmp_path / habit / names[1]).read_bytes()
    assert command(mirror, tmp_path, "refcoco") == 0
    assert (tmp_path / habit / names[1]).read_bytes() == mine
    assert (tmp_path / habit / names[0]).read_bytes() == (IMAGES / names[0]).read_bytes()
    asked = [f"/coco/train2014/{name}" for name in [names[0], *names[2:]]]
    assert sorted(mirror.paths()) == asked


def test_images_elsewhere(mirror: Server, tmp_path: Path) -> None:
    elsewhere = tmp_path / "coco"
    shutil.copytree(IMAGES, elsewhere / "train2014")
    assert command(mirror, tmp_path / "d", "refcoco", "--image_root", str(elsewhere)) == 0
    assert mirror.paths() == ["/refcoco.zip"]


def test_no_images_wanted(mirror: Server, tmp_path: Path) -> None:
    assert command(mirror, tmp_path, "refcoco", "--images", "none") == 0
    assert mirror.paths() == ["/refcoco.zip"]
    assert not (tmp_path / "images").exists()


def wrong_size(name: str) -> bytes:
    with Image.open(IMAGES / name) as image, io.BytesIO() as buffer:
        image.resize((image.width // 2, image.height // 2)).save(buffer, "JPEG")
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        (says(404), "404"),
        (says(200, b"<!doctype html>"), "is not an image"),
        (says(200, b""), "is not an image"),
        (lambda h: h.answer(200, h.body[: len(h.body) // 2]), "truncated"),
        (lambda h: h.answer(200, wrong_size(h.path.rpartition("/")[2])), "pixels instead of"),
        (says(200, bytes(99), Content_Length=1 << 40), "instead of at most"),
    ],
)
def test_an_image_that_does_not_come(
    mirror: Server, tmp_path: Path, mood: Mood, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = needed_names()[0]
    mirror.moods[f"/coco/train2014/{name}"] = [mood] * 9
    assert command(mirror, tmp_path, "refcoco") == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("not fetched: "))
    assert words in line
    assert name in line
    assert "--image_mirror" in line
    assert "refcoco(unc) is damaged" in out
    assert name not in {Path(f).name for f in files(tmp_path)}

    mirror.moods.clear()
    mirror.seen.clear()
    assert command(mirror, tmp_path, "refcoco") == 0
    assert mirror.paths() == [f"/coco/train2014/{name}"]


def test_a_dead_server_is_given_up(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "HOPELESS", 2)
    for path in mirror.files:
        if "coco/" in path:
            mirror.moods[path] = [says(503)] * 9
    with pytest.raises(InputError, match="2 images failed one after the other"):
        command(mirror, tmp_path, "refcoco")


def zip_of_images(names: list[str], folder: str = "train2014/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in names:
            z.write(IMAGES / name, folder + name)
        z.writestr(folder + "readme.txt", "not wanted")
        z.writestr("../COCO_train2014_000000000001.jpg", "led out")
    return buffer.getvalue()


def test_the_zip_of_all_images(mirror: Server, tmp_path: Path) -> None:
    names = sorted(p.name for p in IMAGES.iterdir())
    mirror.files["/coco/zips/train2014.zip"] = zip_of_images(names)
    mirror.moods["/coco/zips/train2014.zip"] = [cut(3000)]
    for _ in range(2):
        assert command(mirror, tmp_path, "refcoco", "--images", "all") == 0
    assert {Path(f).name for f in files(tmp_path / "images")} == set(names)
    assert files(tmp_path / "downloads") == set()
    assert mirror.paths() == ["/refcoco.zip", *["/coco/zips/train2014.zip"] * 2]


def test_refclef_has_a_zip_of_its_own(mirror: Server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.write(CC0_ROOT / "refcoco/instances.json", "refclef/instances.json")
        z.write(CC0_ROOT / "refcoco/refs(unc).p", "refclef/refs(unc).p")
    mirror.files["/refclef.zip"] = buffer.getvalue()
    names = sorted(p.name for p in IMAGES.iterdir())
    mirror.files["/saiapr_tc-12.zip"] = zip_of_images(names, "saiapr_tc-12/01/images/")
    assert command(mirror, tmp_path, "refclef") == 0
    needed = {f"images/saiapr_tc-12/{name}" for name in needed_names()}
    assert files(tmp_path) >= needed


def test_checksums_are_those_of_the_published_files(mirror: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"bytes instead of 53993993.*--mirror"):
        command(mirror, tmp_path, "refcoco", checksum=True)
    (tmp_path / "downloads").mkdir(exist_ok=True)
    (tmp_path / "downloads/refcoco.zip").write_bytes(mirror.files["/refcoco.zip"])
    with pytest.raises(InputError, match="another checksum than sha256:7f924b"):
        command(mirror, tmp_path, "refcoco", checksum=True)
    assert command(mirror, tmp_path, "refcoco", "--images", "none") == 0  # accepted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!doctype html>sorry", "no zip archive"),
        (annotations("refcoco", "other/"), "does not have refs"),
        (annotations("refcoco")[:-30], "no zip archive"),
    ],
)
def test_a_wrong_archive(mirror: Server, tmp_path: Path, body: bytes, words: str) -> None:
    mirror.files["/refcoco.zip"] = body
    with pytest.raises(InputError, match=words):
        command(mirror, tmp_path, "refcoco")
    assert files(tmp_path / "refcoco") == set()


def test_a_full_disk_stops_the_images(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = needed_names()[0]
    (tmp_path / HABIT).mkdir(parents=True)
    (tmp_path / HABIT / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left"):
        command(mirror, tmp_path, "refcoco", "--connections", "1")


def test_weights(mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    name = "swin_base_patch4_window12_384_22k.pth"
    words = ["--weights", "swin_base_w12_384_22k"]
    mirror.files[f"/{name}"] = b"no weights"
    with pytest.raises(FetchError, match="no weights"):
        command(mirror, tmp_path, *words)
    buffer = io.BytesIO()
    torch.save({"model": {"norm.weight": torch.ones(3)}}, buffer)
    mirror.files[f"/{name}"] = buffer.getvalue()
    for _ in range(2):
        assert command(mirror, tmp_path, *words) == 0
    assert files(tmp_path) == {f"pretrained_weights/{name}"}
    assert len(mirror.paths()) == 2


def test_datasets_that_are_not_passed_on(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(server, tmp_path, *download.BY_HAND) == 1
    out = capsys.readouterr().out
    for name, (page, layout) in download.BY_HAND.items():
        assert f"{name} may not be passed on: get it from {page}" in out
        assert layout in out
    assert server.seen == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to download"),
        (["refcocoo"], "no dataset is named 'refcocoo': give refcoco,"),
        (["refcoco", "--mirror", "file:///x"], "--mirror file:///x"),
        (["refcoco", "--image-mirror", "host/x"], "--image_mirror host/x"),
        (["refcoco", "--connections", "0"], "--connections 0"),
        (["refcoco", "--image_root", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        download.main(words, replace(PATIENCE, tries=1))


def test_the_tables_are_complete() -> None:
    assert set(download.BY_HAND) | set(download.ANNOTATIONS) == set(DATASETS)
    assert set(download.BY_HAND).isdisjoint(download.ANNOTATIONS)
    for name, (remote, split_bys) in download.ANNOTATIONS.items():
        assert set(DATASETS[name].counts) <= set(split_bys)
        assert remote.name == f"{name}.zip"
