"""What the site's Slurm cannot give is refused in plain words: by what sinfo says, and by what sbatch refuses."""

import pytest

from moedist.errors import ConfigError
from moedist.submit.executor import JobExecutor
from moedist.submit.profile import read_profile
from moedist.submit.site import read_site, refuse_impossible


@pytest.mark.parametrize("keys, message", [
    ({"amd": "partition: amdx"}, "kind amd: there is no partition 'amdx'; there are amd, mixed, nvidia, urgent"),
    ({"amd": "nodes: 3"}, "kind amd: partition amd has 2 nodes, and 3 are asked for; set nodes: 2 or less"),
    ({"amd": "nodes: 3, partition: mixed"}, "partition mixed has 2 nodes with the feature amd, and 3 nodes are asked for"),
    ({"amd": "gres: 'gpu:amd:2'"}, "partition amd has 0 nodes with gres gpu:amd:2"),
    ({"amd": "tasks_per_node: 9"}, "partition amd has 0 nodes with 9 cores (9 ranks of 1)"),
    ({"amd": "nodes: 1", "time": "'1-00:00:01'"}, "kind amd: partition amd lets jobs run for 1-00:00:00 at most"),
    ({"nvidia": "nodes: 1", "amd": "nodes: 1, memory: 100G"}, None),
])
def test_profiles_that_the_site_cannot_give(slurm, keys, message):
    profile = read_profile(write(slurm, **keys))
    if message is None:  # nobody has looked at memory: Slurm refuses it
        refuse_impossible(profile, read_site())
        with pytest.raises(ConfigError, match="Slurm refuses the job: .* is not available .no nodes of the partition have"):
            slurm.submit(write(slurm, **keys), "placement.planner=equal")
        assert not list((slurm.shared / "wrong").glob("jobs/*"))  # nothing is left of what was not submitted
        return
    with pytest.raises(ConfigError) as error:
        refuse_impossible(profile, read_site())
    assert message in str(error.value)


def write(slurm, nvidia="", amd="", **keys):
    path = slurm.shared / "wrong.yaml"
    lines = ["kinds:"]
    for kind, own in (("nvidia", nvidia), ("amd", amd)):
        if own:
            extra = "" if "partition" in own else f", partition: {kind}"
            lines.append(f"  - {{name: {kind}, constraint: {kind}, {own}{extra}}}")
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in keys.items())]) + "\n")
    return path


def test_what_sbatch_refuses_is_said_in_plain_words(slurm, tmp_path):
    text = "#!/bin/bash\n#SBATCH --partition=mixed --qos=none --gres=gpu:tpu:1\ntrue\n"
    with pytest.raises(ConfigError, match="^Slurm refuses the job: "):
        JobExecutor(tmp_path, text, 1).submit(print)
