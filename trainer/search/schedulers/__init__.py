"""What ends unpromising trials early: one file each, around one of Ray Tune's schedulers."""
