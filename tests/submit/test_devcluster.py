"""slurm/devcluster: what it refuses, and that its nodes are machines of their own."""

import subprocess

import pytest

from tests.submit.cluster import DEVCLUSTER


def devcluster(folder, *arguments):
    return subprocess.run([DEVCLUSTER, "--folder", folder, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments, message", [
    (["start", "nvidia"], "'nvidia' is not KIND=NODES[xGPUS], such as nvidia=2x2"),
    (["start", "mixed=2"], "other than mixed and urgent"),
    (["start", "a=0"], "1 to 99 nodes"),
    (["status"], "no cluster runs in"),
    (["stop"], "no cluster runs in"),
    (["crash", "a1"], "no cluster runs in"),
])
def test_what_it_refuses_is_one_line(tmp_path, arguments, message):
    done = devcluster(tmp_path / "none", *arguments)
    assert done.returncode == 1 and done.stderr.startswith("devcluster: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_second_one_and_unknown_nodes(slurm):
    assert "there is a cluster in" in devcluster(slurm.folder, "start", "a=1").stderr
    said = devcluster(slurm.folder, "crash", "amd9").stderr
    assert "there is no node 'amd9'; there are nvidia1, nvidia2, amd1, amd2" in said


def test_nodes_have_networks_names_and_files_of_their_own(slurm):
    script = "hostname; ip -4 -o addr show eth0 | awk '{print $4}'; ls -A /tmp /dev/shm | wc -l; echo $CUDA_VISIBLE_DEVICES"
    command = ["srun", "-l", "-N", "2", "-p", "nvidia", "--gres=gpu:nvidia:2", "bash", "-c", script]
    done = subprocess.run(command, cwd=slurm.shared, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    said = [[line.split(": ")[1] for line in lines if line.startswith(f"{task}:")] for task in (0, 1)]
    assert {"nvidia1", "nvidia2"} == {word for lines in said for word in lines if word.startswith("nvidia")}
    assert len({word for lines in said for word in lines if word.startswith("10.214.")}) == 2
    assert all("0,1" in lines for lines in said)
    with pytest.raises(FileNotFoundError):
        open("/tmp/of-a-node", encoding="utf-8").close()
    subprocess.run(["srun", "-p", "nvidia", "touch", "/tmp/of-a-node"], cwd=slurm.shared, check=True, timeout=60)
    with pytest.raises(FileNotFoundError):  # this machine's /tmp is another
        open("/tmp/of-a-node", encoding="utf-8").close()
