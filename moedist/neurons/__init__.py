"""What experts are made of, told neuron by neuron: what `moedist inspect` shows.

A neuron is one row of an expert's matrices: it reads the residual stream through gate and up, and writes its row of down to
it. Joint CUR keeps whole neurons, so what a compressed expert does can be read off neurons that training made, by the ids
they had before the first compression.
"""
