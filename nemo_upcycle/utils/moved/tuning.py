raise ImportError(
    "nemo_upcycle.recipes.tuning has moved. Import with_lora from nemo_upcycle.recipes, "
    "and the rest from nemo_upcycle.trainers.nemo.tuning_recipe.",
    name=__name__,
)
