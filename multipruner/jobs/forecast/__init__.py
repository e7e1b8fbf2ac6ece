"""What a run will take, before it is begun: work counted from the recipe, times the rates of this machine."""
