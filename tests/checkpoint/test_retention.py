"""Which checkpoints stay, and what a kill in between leaves behind."""

import doctest

import pytest
import torch

import moedist.checkpoint.retention as retention
from moedist.checkpoint import RunFolder, load_checkpoint, mend, read_meta, save_checkpoint, set_aside
from moedist.checkpoint.retention import put_in_place
from moedist.errors import CheckpointError
from moedist.world import World


def write(folder, step, loss=None, keep=2, keep_best=0, value=None):
    x = torch.full((3,), float(step if value is None else value))
    save_checkpoint(RunFolder(folder), step, {"x": x}, {"valid_loss": loss}, World(), keep, keep_best)


def value(folder, step):
    x = torch.zeros(3)
    load_checkpoint(RunFolder(folder).of_step(step), {"x": x}, World())
    return x[0].item()


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_doctests():
    assert doctest.testmod(retention) == doctest.TestResults(0, 1)


def test_the_best_stay_however_old(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None), (5, 2.2), (6, 2.3)):
        write(tmp_path, step, loss, keep=1, keep_best=2)
    assert RunFolder(tmp_path).steps() == [2, 5, 6]
    write(tmp_path, 7, 1.0, keep=1, keep_best=2)
    assert RunFolder(tmp_path).steps() == [2, 7]
    write(tmp_path, 8, 5.0, keep=1, keep_best=0)
    assert RunFolder(tmp_path).steps() == [8]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 1, value=9)
    assert names(tmp_path) == ["step-00000001"] and value(tmp_path, 1) == 9


@pytest.mark.parametrize("killed", ["after the old one moved", "before the old one was removed"])
def test_killed_while_a_step_takes_the_place_of_itself(tmp_path, killed):
    write(tmp_path, 1)
    write(tmp_path, 2)
    final = RunFolder(tmp_path).checkpoint(2)
    final.rename(final.with_name(final.name + ".old"))
    if killed.startswith("before"):
        write(tmp_path / "other", 2, value=9)
        RunFolder(tmp_path / "other").checkpoint(2).rename(final)
    run, expected = RunFolder(tmp_path), 9 if killed.startswith("before") else 2
    assert run.steps() == [1, 2] and value(tmp_path, 2) == expected  # readers mend nothing
    mend(run)
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and value(tmp_path, 2) == expected


def test_what_is_half_written_or_half_removed_never_counts(tmp_path):
    write(tmp_path, 1)
    for name in ("step-00000002.part", "step-00000001.old.part"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "__0_0.distcp").write_bytes(b"x")
    assert RunFolder(tmp_path).steps() == [1]
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_damaged_one_set_aside_does_not_count_and_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=9)
    set_aside(RunFolder(tmp_path).checkpoint(3))
    assert RunFolder(tmp_path).steps() == [1, 2]
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000003.damaged"]


def test_put_in_place_needs_a_finished_folder(tmp_path):
    part = tmp_path / "checkpoints" / "step-00000004.part"
    part.mkdir(parents=True)
    assert put_in_place(part).name == "step-00000004" and not part.exists()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_meta(RunFolder(tmp_path).checkpoint(4))
