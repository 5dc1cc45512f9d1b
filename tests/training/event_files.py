"""Reads TensorBoard's event files by their description alone.

A file is records: length as uint64, its checksum, data, its checksum; the
checksum is CRC-32C, rotated and shifted. Data is an Event message.
"""

import struct
from pathlib import Path


def read_events(folder):
  """The events of a folder, files in the order of their names.

  Each is a dict of those of wall_time, step, file_version, restart (True) and
  values (tag -> float, or str for text) that it has.
  """
  paths = sorted(Path(folder).iterdir())
  assert all("tfevents" in path.name for path in paths)
  return [_event(data) for path in paths for data in _records(path)]


def curves(events):
  """Tag -> {step: value} as TensorBoard shows it after restarts."""
  shown = {}
  for event in events:
    if event.get("restart"):
      first = event["step"]
      shown = {
        tag: {s: v for s, v in points.items() if s < first}
        for tag, points in shown.items()
      }
    for tag, value in event.get("values", {}).items():
      shown.setdefault(tag, {})[event.get("step", 0)] = value
  return shown


def _records(path):
  content, at = path.read_bytes(), 0
  while at < len(content):
    (length,) = struct.unpack_from("<Q", content, at)
    data = content[at + 12 : at + 12 + length]
    sums = content[at + 8 : at + 12] + content[at + 12 + length :][:4]
    wanted = _masked_crc(content[at : at + 8]), _masked_crc(data)
    assert struct.unpack("<II", sums) == wanted
    yield data
    at += length + 16


def _masked_crc(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _event(data):
  event = {}
  for field, value in _fields(data):
    if field == 1:
      event["wall_time"] = struct.unpack("<d", value)[0]
    elif field == 2:
      event["step"] = value
    elif field == 3:
      event["file_version"] = value.decode()
    elif field == 5:
      event["values"] = dict(_value(v) for _, v in _fields(value))
    elif field == 7:
      event["restart"] = dict(_fields(value)) == {1: 1}
  return event


def _value(data):
  fields = dict(_fields(data))
  if 2 in fields:
    return fields[1].decode(), struct.unpack("<f", fields[2])[0]
  plugin = dict(_fields(dict(_fields(fields[9]))[1]))
  assert plugin[1] == b"text"
  tensor = dict(_fields(fields[8]))
  assert tensor[1] == 7  # DT_STRING
  return fields[1].decode(), tensor[8].decode()


def _fields(data):
  """(number, value) of a protocol buffer message."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
    else:
      size = {1: 8, 5: 4}.get(kind)
      if size is None:
        assert kind == 2
        size, at = _varint(data, at)
      value, at = data[at : at + size], at + size
    yield key >> 3, value


def _varint(data, at):
  value = shift = 0
  while True:
    value |= (data[at] & 127) << shift
    at, shift = at + 1, shift + 7
    if data[at - 1] < 128:
      return value, at
