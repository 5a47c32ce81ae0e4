"""A lock that nobody holds any more must not hold up every later run."""

import os
import time

from moedist.engine.extension_locks import remove_old_locks


def test_old_locks_go_and_new_ones_stay(tmp_path):
    said = []
    for name, age in (("old", 1000), ("new", 5)):
        (tmp_path / "py" / name).mkdir(parents=True)
        (tmp_path / "py" / name / "lock").touch()
        (tmp_path / "py" / name / "op.so").touch()
        os.utime(tmp_path / "py" / name / "lock", (time.time() - age,) * 2)
    assert remove_old_locks(said.append, tmp_path) == [tmp_path / "py" / "old" / "lock"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["lock", "op.so", "op.so"]
    assert len(said) == 1 and str(tmp_path / "py" / "old" / "lock") in said[0]
    assert remove_old_locks(said.append, tmp_path / "none") == []
