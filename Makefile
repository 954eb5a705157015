# Every target sets up what it needs. Two to know: make txt2img PROMPT="a red apple"; make test.
PYTHON ?= python3.11
PY := .venv/bin/python
