"""Slurm: a job over nodes of several kinds, from a YAML file (`profile`) to an sbatch text (`shape`, `render`), through
submitit (`executor`, `submit`), on every rank (`task`), and over its lives (`life`).

Nothing is imported here: the scripts of a job start these modules by name, in seconds that count.
"""
