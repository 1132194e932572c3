"""The tests: a folder for each thing that is promised, and ``support``, what the tests share."""
