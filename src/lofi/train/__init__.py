"""Training: a `transformers.Trainer` whose checkpoints are and loss are exact, and which stops when it is wrong.

Rooms inside   trainer (the Trainer), checkpoint (what a checkpoint holds), objectives (the loss of each task),
               proofs and finite (what stops a run), journal, progress and verdict (what is said about it),
               settings (every automatic choice), folder (the run folder), run (the whole road of `lofi train`).
Not here       how a file becomes examples (data), how an adapter becomes a folder (files).
"""
