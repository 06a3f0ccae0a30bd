"""What is wrong with a training as a whole: each condition and its words, for the warning and the advice alike."""
