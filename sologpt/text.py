"""The address from which notebooks and programs import `stream_text`; its code is in sologpt/stream.py."""

from sologpt.stream import stream_text as stream_text
