"""Which videos `examples/corpus` finds, and what it says of a corpus that it cannot read. Without Ray."""

import pytest
from corpus import encode, table
from corpus.videos import find_videos


@pytest.fixture
def folder(tmp_path):
    """A folder with files of many names, empty ones."""
    for name in ("b.mp4", "a/b.mp4", "a/ü.MKV", "a/deep/c.webm", ".hidden.mp4", "notes.txt", "b.mp4.json"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "videos"


def listing(folder, *lines):
    path = folder / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return find_videos(path)


def test_a_folder(folder):
    names = ["a/b.mp4", "a/deep/c.webm", "a/ü.MKV", "b.mp4"]
    assert find_videos(folder) == {name: str(folder / name) for name in names}


def test_a_listing(folder):
    """Names stay inside the folder of the memories, whatever the list says."""
    addresses = ["https://user:secret@host.example/a/%C3%BC.mp4?token=1#part", "http://host.example/../x.mp4"]
    found = listing(folder, "a/b.mp4", "", "  ./b.mp4 ", "../other.mp4", "/data/c.mp4", "b.mp4", *addresses)
    assert found == {
        "a/b.mp4": str(folder / "a/b.mp4"),
        "b.mp4": str(folder / "b.mp4"),
        str(folder.parent / "other.mp4").lstrip("/"): str(folder.parent / "other.mp4"),
        "data/c.mp4": "/data/c.mp4",
        "host.example/a/ü.mp4": addresses[0],
        "host.example/x.mp4": addresses[1],
    }


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ([], "no video"),
        (["https://host.example/a.mp4?v=1", "https://host.example/a.mp4?v=2"], "host.example/a.mp4"),
    ],
)
def test_bad_listings(folder, lines, fragment):
    with pytest.raises(ValueError, match=fragment):
        listing(folder, *lines)


@pytest.mark.parametrize(
    ("program", "arguments", "fragment"),
    [
        (encode, ["missing"], "missing"),
        (encode, ["."], "no video in '.'"),
        (encode, [".", "--start", "5", "--end", "3"], "nothing from 5.0 to 3.0"),
        (encode, [".", "--model", "./nowhere"], "no folder './nowhere'"),
        (table, ["."], "no memory in"),
    ],
)
def test_errors_before_ray_starts(program, arguments, fragment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["corpus", *arguments, "-o", "output"])
    assert program.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and fragment in error
    assert list(tmp_path.iterdir()) == []
