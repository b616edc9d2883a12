"""What the data sets, models and tasks of pictures share."""
