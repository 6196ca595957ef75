"""How a person asks: the sentences of the demo, in English and Vietnamese.

Knows words only. In a sentence {c} is what is selected, {a} an aggregate of a column, {t} the table, {u} the table it
is joined with, {w} the condition, {g} the column grouped by, {k} the column sorted by, {n} a count. No sentence starts
with a name: the tokenizer writes ` price` and `price` with different tokens, and a name should be copied whole.
Rejected: synonyms for columns ("how expensive"); the model knows no synonyms, and a made-up name has none.
"""

from __future__ import annotations

SENTENCES = {
    "en": {
        "select": ("Show the {c} of {t} with {w}", "Which {c} do {t} with {w} have?", "List {c} for all {t} where {w}"),
        "count": ("How many {t} have {w}?", "Count the {t} with {w}", "What is the number of {t} where {w}?"),
        "aggregate": ("What is the {a} of {t}?", "Find the {a} among all {t}", "Give me the {a} over the {t}"),
        "aggregate_where": ("What is the {a} of {t} with {w}?", "Find the {a} among {t} where {w}"),
        "top": ("Show the {c} of the first {n} {t} by {k}", "Sort {t} by {k} and give the {c} of the first {n}"),
        "order": ("List the {c} of {t} sorted by {k}", "Show {c} for all {t}, ordered by {k}"),
        "group": ("How many {t} are there for each {g}?", "Count the {t} per {g}"),
        "group_aggregate": ("What is the {a} of {t} for each {g}?", "Show the {a} of the {t} per {g}"),
        "join_select": ("Show the {c} of {t} whose {u} have {w}", "Which {c} do {t} have if their {u} have {w}?"),
        "join_count": ("How many {t} have {u} with {w}?", "Count the {t} whose {u} have {w}"),
        "join_aggregate": ("What is the {a} of {t} whose {u} have {w}?", "Find the {a} of {t} that have {u} with {w}"),
        "join_group": ("How many {t} are there for each {g} of their {u}?", "Count the {t} per {g} of the {u}"),
    },
    "vi": {
        "select": ("Cho xem {c} của các {t} có {w}", "Liệt kê {c} của {t} với {w}", "Tìm {c} trong {t} khi {w}"),
        "count": ("Có bao nhiêu {t} có {w}?", "Đếm số {t} với {w}", "Số lượng {t} có {w} là bao nhiêu?"),
        "aggregate": ("Tính {a} của tất cả {t}", "Cho biết {a} của các {t}", "Trong {t}, {a} là bao nhiêu?"),
        "aggregate_where": ("Tính {a} của các {t} có {w}", "Cho biết {a} của {t} với {w}"),
        "top": ("Cho xem {c} của {n} {t} có {k}", "Tìm {n} {t} với {k}, chỉ lấy {c}"),
        "order": ("Liệt kê {c} của các {t}, sắp theo {k}", "Cho xem {c} của {t} xếp theo {k}"),
        "group": ("Mỗi {g} có bao nhiêu {t}?", "Đếm số {t} theo từng {g}"),
        "group_aggregate": ("Tính {a} của {t} theo từng {g}", "Với mỗi {g}, {a} của các {t} là bao nhiêu?"),
        "join_select": ("Cho xem {c} của các {t} thuộc {u} có {w}", "Liệt kê {c} của {t} mà {u} có {w}"),
        "join_count": ("Có bao nhiêu {t} thuộc {u} có {w}?", "Đếm số {t} mà {u} có {w}"),
        "join_aggregate": ("Tính {a} của các {t} thuộc {u} có {w}", "Cho biết {a} của {t} mà {u} có {w}"),
        "join_group": ("Mỗi {g} của {u} có bao nhiêu {t}?", "Đếm số {t} theo từng {g} của {u}"),
    },
}

AGGREGATES = {
    "en": {
        "avg": ("average {c}", "mean {c}"),
        "max": ("highest {c}", "maximum {c}"),
        "min": ("lowest {c}", "minimum {c}"),
        "sum": ("sum of {c}", "total {c}"),
    },
    "vi": {
        "avg": ("trung bình {c}", "giá trị trung bình của {c}"),
        "max": ("{c} lớn nhất", "{c} cao nhất"),
        "min": ("{c} nhỏ nhất", "{c} thấp nhất"),
        "sum": ("tổng {c}", "tổng số {c}"),
    },
}

COMPARISONS = {
    "en": {">": ("{c} over {v}", "{c} above {v}"), "<": ("{c} under {v}", "{c} below {v}"), "=": ("{c} equal to {v}",)},
    "vi": {">": ("{c} lớn hơn {v}", "{c} trên {v}"), "<": ("{c} nhỏ hơn {v}", "{c} dưới {v}"), "=": ("{c} bằng {v}",)},
}

TEXT_EQUALS = {"en": ("{c} '{v}'", "{c} equal to '{v}'"), "vi": ("{c} là '{v}'", "{c} bằng '{v}'")}

# The word that says which way follows the column and differs in its first token: whoever copies the column next looks
# at what came after it, and `highest salary` against `lowest salary` was the last thing the model still confused.
EXTREMES = {
    "en": {"desc": ("{c} descending", "{c} high to low"), "asc": ("{c} ascending", "{c} low to high")},
    "vi": {"desc": ("{c} cao nhất", "{c} lớn nhất"), "asc": ("{c} thấp nhất", "{c} nhỏ nhất")},
}

DIRECTIONS = {
    "en": {"desc": ("{c} descending", "{c} high to low"), "asc": ("{c} ascending", "{c} low to high")},
    "vi": {"desc": ("{c} giảm dần", "{c} cao trước"), "asc": ("{c} tăng dần", "{c} thấp trước")},
}

AND = {"en": " and ", "vi": " và "}
