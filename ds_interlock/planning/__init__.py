"""What a configuration would cost before anybody rents the machines: profiles, forecasts, pictures.

    profile.py      what each layer of a model costs, measured or estimated, as a JSON file
    partition.py    layers to stages, so that the slowest stage is as fast as can be
    zero_bubble.py  ZB-H1, the schedule to beat among those with global gradients
    forecast.py     a setting played through at those costs: time, bubble, memory, traffic
    verdict.py      one honest sentence: what is fastest, and whether interlocking pays at all
    report.py       the forecasts as a table, as JSON, as an SVG, as a trace
    page.py         the forecasts as one HTML page with sliders

Pure Python, like ``schedule``: planning needs neither torch nor a GPU.
"""
