"""The demo, ``python -m twloss``: a small ranker trained on MovieLens, on one process or on the ranks of torchrun.

One run takes this way, a file a stage::

    start.py          python -m twloss, or what the demo lacks
    options.py        the command line                                      -> Options
    movielens.py      100,004 ratings, split by time                        -> Rows to train on, Rows to evaluate
    process_group.py  the ranks, and each one's share of the rows
    ranker.py         ids and genres -> logits (rows, tasks) -> losses; the loss is a submodule of the model
    training.py       steps, running losses, evaluations                    -> one Point an interval
    report.py         the lines, the table and the check                    -> the terminal
    curves.py         the losses over the course of the training            -> a picture
    job.py            the stages in a row
"""
