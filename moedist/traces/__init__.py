"""What the routing of a text tells: how evenly experts are used, how long a token's experts stay those of the next tokens,
and how an expert follows from that of the layer before.

Pure: a trace is a boolean tensor [G sequences, S tokens, E experts] of one layer. `consistency` and `affinity` count in it;
counts add up over sequences, and so over ranks. `record` holds them, `report` and `pictures` show them.
"""
