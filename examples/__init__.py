"""twloss in the training loops that people have: one file each, to paste from.

Every ``main()`` returns the numbers that it prints, and runs in one process or on all
ranks of a process group.
"""
