"""Stages are named by what determines them, done once, held against others, and forgotten whole."""

from __future__ import annotations

import threading
import time

import pytest

from secateur.errors import BusyError, CheckpointError, StorageError
from secateur.lab.store import Store, locked, read_json, write_json


def test_a_key_follows_everything_in_the_spec_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("train", {"a": 1, "b": {"c": [1, 2]}})
    assert stage.key == store.stage("train", {"b": {"c": [1, 2]}, "a": 1}).key
    assert stage.key == Store(tmp_path / "elsewhere").stage("train", {"a": 1, "b": {"c": [1, 2]}}).key
    others = [("prune", {"a": 1, "b": {"c": [1, 2]}}), ("train", {"a": 2, "b": {"c": [1, 2]}}), ("train", {"a": 1})]
    assert len({stage.key, *(store.stage(kind, spec).key for kind, spec in others)}) == 4


def test_a_stage_is_done_when_its_result_is_there(tmp_path):
    stage = Store(tmp_path).stage("train", {"a": 1})
    assert not stage.done
    assert not stage.folder.exists()
    with stage.work():
        assert not stage.done
        assert read_json(stage.folder / "stage.json") == stage.spec
        stage.finish({"top1": 0.5})
    assert stage.done
    assert Store(tmp_path).stage("train", {"a": 1}).result() == {"top1": 0.5}


def test_forgetting_takes_all_but_the_lock(tmp_path):
    stage = Store(tmp_path).stage("train", {"a": 1})
    stage.forget()
    assert not stage.folder.exists(), "what was never there is not made"
    with stage.work():
        (stage.folder / "deep").mkdir()
        (stage.folder / "deep" / "file").write_text("x")
        stage.finish({})
    stage.forget()
    assert not stage.done
    assert {p.name for p in stage.folder.iterdir()} <= {".lock"}


def test_forgetting_waits_for_who_works_there(tmp_path):
    stage = Store(tmp_path).stage("train", {"a": 1})
    order = []
    working = threading.Event()

    def work() -> None:
        with stage.work():
            working.set()
            time.sleep(0.2)
            order.append("worked")
            stage.finish({})

    thread = threading.Thread(target=work)
    thread.start()
    assert working.wait(5)
    stage.forget()
    order.append("forgot")
    thread.join()
    assert order == ["worked", "forgot"]
    assert not stage.done


def test_the_second_waits_and_finds_the_result(tmp_path):
    done_by = []

    def work(name: str) -> None:
        stage = Store(tmp_path).stage("train", {"a": 1})
        with stage.work():
            if not stage.done:
                time.sleep(0.05)
                done_by.append(name)
                stage.finish({"by": name})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done_by) == 1


def test_files_of_a_killed_writer_are_swept(tmp_path):
    stage = Store(tmp_path).stage("train", {"a": 1})
    with stage.work():
        (stage.folder / ".checkpoint.safetensors.123.partial").write_bytes(b"half")
        (stage.folder / "checkpoint.safetensors").write_bytes(b"whole")
    with stage.work():
        assert {p.name for p in stage.folder.iterdir()} == {".lock", "stage.json", "checkpoint.safetensors"}


def test_a_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a", wait=0):
        raise ZeroDivisionError
    with (
        locked(tmp_path / "a", wait=0),
        pytest.raises(BusyError, match="in use by another process"),
        locked(tmp_path / "a", wait=0),
    ):
        pass


def test_errors_of_the_work_inside_keep_their_kind(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "a", wait=0):
        (tmp_path / "a" / "none").read_text()


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="choose another --out"), Store(tmp_path / "out").stage("train", {}).work():
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b'{"rows": [', b"\xff\xfe", b"[1]", b"null", b"\x80\x04pickle"])
def test_a_damaged_result_is_said_in_one_line(tmp_path, content):
    stage = Store(tmp_path).stage("train", {"a": 1})
    with stage.work():
        stage.finish({})
        (stage.folder / "result.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"result\.json: .*delete it to redo that stage"):
        stage.result()


def test_json_files(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": [1, None]}
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "none.json")
