"""How right the methods are, on pictures whose truth is known: pairs with a label, graded corruptions, tables.

`pairs` draws pictures and what they copy, `photographs` the same out of photographs, `corruptions` spoils the copy,
`trials` runs every variant of the metric over them and fills the tables of `memscan evaluate metric`.
"""
