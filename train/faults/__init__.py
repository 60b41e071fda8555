"""What goes wrong while a run trains, how it is noticed, and what is done about it."""
