raise ImportError(
    "nemo_upcycle.recipes.common has moved. Import use_spec, start_from and checkpoints from nemo_upcycle.recipes, "
    "and the rest from nemo_upcycle.trainers.nemo.recipe_parts.",
    name=__name__,
)
