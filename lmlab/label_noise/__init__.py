"""`lmlab label-noise`: which labels of a file of preferences an ensemble disagrees with, and a file that says so."""
