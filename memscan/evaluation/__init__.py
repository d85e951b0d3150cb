"""This package measures how correct the methods are on pictures whose truth is known.

It has pairs with a label, graded corruptions, and tables.

`pairs` renders pictures and copies of them, and `photographs` makes the same from photographs. `corruptions` corrupts
the copies. `variants` runs every variant of the metric over them, and `tables` makes the tables of
`memscan evaluate metric`.
"""
