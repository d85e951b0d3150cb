"""This package measures how correct the methods are on pictures whose truth is known.

It has pairs with a label, graded corruptions, and tables.

`pairs` draws pictures and what they copy, `photographs` the same out of photographs, `corruptions` spoils the copy,
`trials` runs every variant of the metric over them and fills the tables of `memscan evaluate metric`.
"""
