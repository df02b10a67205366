"""The fitting: one process or many, one loop. It goes on from any checkpoint as if it had never stopped.

`start.fitted` is the way in. `loop` is the loop, the same in each process; `ranks` is what the processes tell each
other, `sharing` how they share the model, `agent` and `worker` how they are started, and started again.

What is promised: the same task, number of processes and machine give the same bits, killed and resumed or not. Between
different numbers of processes the weights differ by rounding alone, where nothing is drawn at random (dropout,
augmentation) and nothing looks at a whole batch (batch normalisation, see `sharing`).
"""
