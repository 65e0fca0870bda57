"""Videos that are still coming: files that grow, pipes, addresses; which frames are taken, and how they end."""

import base64
import logging
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from live_sources import WebServer, being_written, pieces, quiet_pipe, rtsp_server
from video_files import draw_number, read_number, write_cut_video, write_sound, write_video

from mambamia_hf.live_video import LiveVideo
from mambamia_hf.video_processing_mambamia import MambaMiaVideoProcessor


NUM_FRAMES, FPS = 40, 10
SAMPLED = [2, 7, 12, 17, 22, 27, 32, 37]  # on display in the middle of each half second
TIMEOUT = 1.0


@pytest.fixture(autouse=True)
def quiet_ffmpeg():
    libav = logging.getLogger("libav")
    level = libav.level
    libav.setLevel(logging.CRITICAL)
    yield
    libav.setLevel(level)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One video in several containers, all of them long finished."""
    folder = tmp_path_factory.mktemp("videos")
    paths = {}
    for name, options in {
        "late.mp4": {},
        "early.mp4": {"container_options": {"movflags": "faststart"}},
        "parts.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
        "video.ts": {},
        "video.mkv": {},
        "video.avi": {"codec_options": {"bf": "0"}},
        "video.flv": {},
    }.items():
        paths[name] = write_video(folder / name, num_frames=NUM_FRAMES, fps=FPS, **options)
        os.utime(paths[name], (1, 1))
    return paths


def watch(source, fps=2.0, timeout=TIMEOUT, **kwargs):
    """The numbers of the frames and their times, and the video."""
    with LiveVideo(str(source), fps, timeout=timeout, **kwargs) as video:
        frames = [frame for batch in video.batches() for frame in batch]
    return [read_number(picture) for _, picture in frames], [time for time, _ in frames], video


def notes_of(video):
    return [video.notes.get() for _ in range(video.notes.qsize())]


@pytest.mark.parametrize(
    "name", ["late.mp4", "early.mp4", "parts.mp4", "video.ts", "video.mkv", "video.avi", "video.flv"]
)
def test_a_finished_file_is_sampled_as_offline(videos, name):
    numbers, times, video = watch(videos[name])
    assert numbers == SAMPLED
    assert times == pytest.approx([number / FPS for number in SAMPLED], abs=1e-3)
    assert str(videos[name]) in video.ending and not notes_of(video)
    processor = MambaMiaVideoProcessor(size={"height": 48, "width": 64}, do_rescale=False, do_normalize=False)
    offline = processor([str(videos[name])], return_tensors="pt", return_metadata=True)
    assert [read_number(frame) for frame in offline["pixel_values_videos"][0]] == numbers


@pytest.mark.parametrize("fps", [0.5, 1, 3, 10, 25])
def test_other_rates(videos, fps):
    numbers, times, _ = watch(videos["video.ts"], fps)
    middles = (np.arange(int(NUM_FRAMES / FPS * fps)) + 0.5) / fps
    expected = np.unique((middles * FPS + 1e-6).astype(int)).tolist()
    assert numbers == expected
    assert times == sorted(set(times))


@pytest.mark.parametrize("name", ["video.ts", "video.mkv", "video.flv", "parts.mp4"])
def test_a_growing_file(videos, name, tmp_path):
    with being_written(tmp_path / name, videos[name].read_bytes()) as path:
        numbers, _, video = watch(path)
    assert numbers == SAMPLED
    assert "has not grown for 1 seconds" in video.ending


def test_a_transport_stream_that_ffmpeg_writes_while_it_is_watched(tmp_path):
    path = tmp_path / "recording.ts"
    program = (
        "import sys, time, av, numpy as np\n"
        "from video_files import draw_number\n"
        "with av.open(sys.argv[1], 'w', options={'flush_packets': '1'}) as container:\n"
        "    options = {'g': '10', 'bf': '0', 'tune': 'zerolatency'}\n"
        "    stream = container.add_stream('libx264', rate=10, options=options)\n"
        "    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'\n"
        "    for number in range(40):\n"
        "        frame = av.VideoFrame.from_ndarray(draw_number(number), format='rgb24')\n"
        "        frame.pts = number\n"
        "        container.mux(stream.encode(frame))\n"
        "        time.sleep(0.05)\n"
        "    container.mux(stream.encode())\n"
    )
    helpers = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen([sys.executable, "-c", program, path], env={**os.environ, "PYTHONPATH": helpers}) as writer:
        while not (path.exists() and path.stat().st_size):
            assert writer.poll() is None
        numbers, _, _ = watch(path, timeout=3)
    assert writer.returncode == 0
    assert numbers == SAMPLED


def test_a_pipe_that_ends(videos, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with being_written(tmp_path / "pipe", videos["video.ts"].read_bytes(), pause=0.05) as path:
        numbers, _, video = watch(path)
    assert numbers == SAMPLED and video.ending == f"'{path}' has ended"


def test_standard_input(videos):
    program = (
        "from video_files import read_number\n"
        "from mambamia_hf.live_video import LiveVideo\n"
        "with LiveVideo('-', 2.0, timeout=20) as video:\n"
        "    print([read_number(picture) for batch in video.batches() for _, picture in batch], video.ending)\n"
    )
    helpers = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=videos["video.ts"].read_bytes(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": helpers},
    )
    assert result.stdout.decode().strip() == f"{SAMPLED} the standard input has ended"


def test_a_pipe_that_falls_silent(videos, tmp_path):
    with quiet_pipe(tmp_path / "pipe", videos["video.ts"].read_bytes()) as path:
        with LiveVideo(str(path), 2, timeout=TIMEOUT) as video:
            frames = []
            with pytest.raises(ValueError, match=f"nothing has come from '{path}' for 1 seconds"):
                for batch in video.batches():
                    frames += batch
    assert [read_number(picture) for _, picture in frames] == SAMPLED


def test_a_pipe_without_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="nothing has come from"):
        watch(tmp_path / "pipe")


def test_an_address(videos):
    with WebServer({"/live.ts": pieces(videos["video.ts"].read_bytes())}) as server:
        numbers, _, video = watch(f"http://{server.address}/live.ts")
    assert numbers == SAMPLED
    assert video.ending.startswith(f"'http://{server.address}/live.ts' has ended")


def test_an_address_that_falls_silent(videos):
    content = pieces(videos["video.ts"].read_bytes())
    with WebServer({"/live.ts": content}, hangs=True) as server:
        with LiveVideo(f"http://me:secret@{server.address}/live.ts?token=hidden", 2, timeout=TIMEOUT) as video:
            frames = []
            with pytest.raises(ValueError, match="nothing has come from") as error:
                for batch in video.batches():
                    frames += batch
    assert "secret" not in str(error.value) and "hidden" not in str(error.value)
    assert len(frames) >= len(SAMPLED) - 1


def test_an_address_that_never_answers():
    with WebServer({"/live.ts": []}, hangs=True) as server, pytest.raises(ValueError, match="nothing has come from"):
        watch(f"http://{server.address}/live.ts")


def test_secrets_are_in_no_message():
    for address in (
        "http://me:secret@127.0.0.1:9/live?token=hidden",
        "rtsp://me:secret@127.0.0.1:9/live?token=hidden",
    ):
        with pytest.raises(ValueError) as error:
            watch(address)
        assert "secret" not in str(error.value) and "hidden" not in str(error.value)
        assert "127.0.0.1:9/live" in str(error.value)
        assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize("user", ["", "me:secret"])
def test_rtsp(videos, user):
    content = videos["video.ts"].read_bytes()
    with rtsp_server(content, base64.b64encode(user.encode()).decode()) as address:
        numbers, _, video = watch(f"rtsp://{user + '@' if user else ''}{address}/door", timeout=5)
    assert numbers == SAMPLED
    assert f"'rtsp://{address}/door' has ended" in video.ending


def test_rtsp_that_falls_silent(videos):
    with rtsp_server(videos["video.ts"].read_bytes(), hangs=True) as address:
        with pytest.raises(ValueError, match="nothing has come from"):
            watch(f"rtsp://{address}/door")


def test_a_playlist_is_opened_where_the_address_names_one(videos, tmp_path):
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nvideo.ts\n#EXT-X-ENDLIST\n"
    pages = {
        "/list.m3u8": [playlist],
        "/list": [playlist],
        "/file.m3u8": [playlist.replace(b"video.ts", os.fsencode(videos["video.ts"]))],
        "/address.m3u8": [playlist.replace(b"video.ts", b"file://" + os.fsencode(videos["video.ts"]))],
        "/video.ts": [videos["video.ts"].read_bytes()],
    }
    with WebServer(pages) as server:
        assert watch(f"http://{server.address}/list.m3u8?token=x", timeout=5)[0] == SAMPLED
        for page in ("list", "file.m3u8", "address.m3u8"):
            with pytest.raises(ValueError):
                watch(f"http://{server.address}/{page}", timeout=5)
    (tmp_path / "list.m3u8").write_bytes(playlist.replace(b"video.ts", os.fsencode(videos["video.ts"])))
    os.utime(tmp_path / "list.m3u8", (1, 1))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        watch(tmp_path / "list.m3u8")


def test_an_address_leads_to_no_file(videos):
    with WebServer({"/live.ts": f"file://{videos['video.ts']}"}) as server:
        with pytest.raises(ValueError, match="cannot be read as a video"):
            watch(f"http://{server.address}/live.ts")


def test_sources_that_are_none(tmp_path):
    for source, kind, message in (
        (tmp_path / "none.ts", FileNotFoundError, "there is no file or device"),
        (tmp_path, ValueError, "is a folder"),
        ("/dev/video99", FileNotFoundError, "there is no file or device"),
        ("ftp://127.0.0.1/video.ts", ValueError, "another kind than http, https, rtsp, rtsps"),
        ("concat:a|b", FileNotFoundError, "there is no file or device"),
        ("http://127.0.0.1/a b", ValueError, "blanks or control characters"),
        ("http://127.0.0.1/a\r\nX: y", ValueError, "blanks or control characters"),
        ("http://[::1", ValueError, "cannot be read as a video"),
    ):
        with pytest.raises(kind, match=message):
            watch(source)


def test_files_that_hold_no_video(videos, tmp_path):
    (tmp_path / "text.ts").write_text("no video\n" * 100)
    sound = write_sound(tmp_path / "sound.mkv")
    for path, message in ((tmp_path / "text.ts", "cannot be read as a video"), (sound, "no video stream")):
        os.utime(path, (1, 1))
        with pytest.raises(ValueError, match=message):
            watch(path)


def test_a_file_that_is_cut_off(tmp_path):
    path = write_cut_video(tmp_path / "cut.ts", 0.5, num_frames=NUM_FRAMES, fps=FPS)
    os.utime(path, (1, 1))
    numbers, _, _ = watch(path)
    assert 2 <= len(numbers) < len(SAMPLED) and numbers == SAMPLED[: len(numbers)]


def test_a_recording_that_begins_inside_a_group_of_pictures(videos, tmp_path):
    content = videos["video.ts"].read_bytes()
    (tmp_path / "late.ts").write_bytes(content[len(content) // 3 // 188 * 188 :])
    os.utime(tmp_path / "late.ts", (1, 1))
    numbers, times, _ = watch(tmp_path / "late.ts", fps=10)
    assert numbers[0] % 10 == 0  # a key frame
    assert times[0] == 0.0 and numbers == list(range(numbers[0], NUM_FRAMES))


def test_times_that_start_again(videos, tmp_path):
    content = videos["video.ts"].read_bytes()
    (tmp_path / "twice.ts").write_bytes(content + content)
    os.utime(tmp_path / "twice.ts", (1, 1))
    numbers, times, video = watch(tmp_path / "twice.ts")
    assert numbers[:8] == SAMPLED and len(numbers) in (15, 16)
    assert times == sorted(set(times)) and times[-1] == pytest.approx(7.7, abs=0.3)
    assert any("times jump" in note for note in notes_of(video))


def test_a_source_of_another_picture_size_midway_keeps_its_own(tmp_path):
    small = write_video(tmp_path / "small.ts", num_frames=20, fps=FPS).read_bytes()
    large = [draw_number(number, 96, 128) for number in range(20, 40)]
    write_video(tmp_path / "large.ts", images=large, fps=FPS, start=2.0)
    (tmp_path / "both.ts").write_bytes(small + (tmp_path / "large.ts").read_bytes())
    os.utime(tmp_path / "both.ts", (1, 1))
    with LiveVideo(str(tmp_path / "both.ts"), 2, timeout=TIMEOUT) as video:
        pictures = [picture for batch in video.batches() for _, picture in batch]
    assert {picture.shape for picture in pictures} == {(3, 48, 64)}
    assert [read_number(picture) for picture in pictures][-1] == 37


def test_a_slow_model_leaves_out_frames_of_an_address_and_none_of_a_file(videos, monkeypatch):
    monkeypatch.setattr("mambamia_hf.live_video._QUEUE_FRAMES", 4)
    with LiveVideo(str(videos["video.ts"]), 10, timeout=TIMEOUT) as video:
        video._thread.join(0.5)  # while nobody takes the frames
        assert sum(len(batch) for batch in video.batches()) == NUM_FRAMES and not video.num_missed
    with WebServer({"/live.ts": [videos["video.ts"].read_bytes()]}) as server:
        with LiveVideo(f"http://{server.address}/live.ts", 10, timeout=5) as video:
            while not video.num_missed:
                assert video._thread.is_alive()
            taken = sum(len(batch) for batch in video.batches())
    assert 4 <= taken == NUM_FRAMES - video.num_missed


def test_leaving_early_ends_the_thread(videos):
    with LiveVideo(str(videos["video.ts"]), 10, timeout=60) as video:
        next(video.batches(most=1))
    assert not video._thread.is_alive()


def test_pictures_are_those_that_a_player_shows(tmp_path):
    path = write_video(tmp_path / "wide.mkv", num_frames=10, fps=FPS)
    os.utime(path, (1, 1))
    with LiveVideo(str(path), 10, transform=lambda picture: picture[:, ::2, ::2], timeout=TIMEOUT) as video:
        (time, picture), *_ = next(video.batches())
    assert picture.shape == (3, 24, 32) and time == 0.0


def test_av_has_cameras():
    assert any("v4l2" in name for name in av.formats_available)
