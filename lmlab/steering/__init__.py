"""`lmlab steer`: texts that a language model writes under a program, watched as they are written, told of after."""
