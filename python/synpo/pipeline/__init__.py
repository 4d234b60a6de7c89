"""From videos to preference pairs, in the order of the data:

clips.py       video → clips → frames
caption.py     frames → captions: a draft, then a second look (retrospect.py)
decode.py      many prompts → answers, plain or contrastive (reader.py reads the prompts, streams.py holds caches)
judge/         candidates and clip captions → scores
pairs.py       scores → the best against the worst
stages.py      the above over a whole folder, each stage resumable; run.py puts them together, summary.py reports
"""
