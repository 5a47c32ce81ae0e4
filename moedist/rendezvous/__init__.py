"""How the processes of a job become ranks of one world: what the launcher says (`launch`, `slurm`), over which network
(`interface`), at which address (`address`), and when all are there (`meeting`).

Nothing is imported here: the command line needs `launch` before torch may be imported.
"""
