"""What the commands do, from recipe to folder: the stages that all of them share."""
