raise ImportError(
    "nemo_upcycle.recipes.h100_arguments has moved. Its functions are in nemo_upcycle.trainers.recipe_arguments.",
    name=__name__,
)
