raise ImportError(
    "nemo_upcycle.recipes.own_parent has moved. Import upcycled_from from nemo_upcycle.recipes, "
    "and the rest from nemo_upcycle.trainers.nemo.own_parent.",
    name=__name__,
)
