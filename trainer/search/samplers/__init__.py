"""What proposes the parameters of the next trial: one file each, around one of Optuna's samplers."""
