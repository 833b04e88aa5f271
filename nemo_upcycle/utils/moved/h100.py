raise ImportError(
    "nemo_upcycle.recipes.h100 has moved. Its functions are in nemo_upcycle.trainers.nemo.paper_recipe.",
    name=__name__,
)
