// Ids as Python's lists and numpy's arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "id_array.h"

namespace py = pybind11;

namespace fastgpt {

// Makes lists out of one integer object for each id, which takes a third of the time that new ones
// do. Needs the GIL.
class IntegerTable {
 public:
  explicit IntegerTable(std::size_t ids) : objects_(ids, nullptr) {}
  IntegerTable(const IntegerTable&) = delete;
  IntegerTable& operator=(const IntegerTable&) = delete;
  ~IntegerTable() {
    for (PyObject* const object : objects_) Py_XDECREF(object);
  }

  py::list list(const std::uint32_t* ids, std::size_t count) {
    py::list out(static_cast<py::ssize_t>(count));
    PyObject** const items = PySequence_Fast_ITEMS(out.ptr());
    for (std::size_t i = 0; i < count; ++i) {
      PyObject*& object = objects_[ids[i]];
      if (!object) make(object, ids[i]);
      Py_INCREF(object);
      items[i] = object;
    }
    return out;
  }

 private:
  static void make(PyObject*& object, std::uint32_t id) {
    object = PyLong_FromUnsignedLong(id);
    if (!object) throw py::error_already_set();
  }

  std::vector<PyObject*> objects_;
};

// Whether the object is an int from 0 to 2^30 - 1; its value. Runs no code of others.
inline bool small_integer(PyObject* object, std::uint32_t* value) {
  if (!PyLong_CheckExact(object)) return false;
  auto* const integer = reinterpret_cast<PyLongObject*>(object);
#if PY_VERSION_HEX >= 0x030C0000
  if (!PyUnstable_Long_IsCompact(integer)) return false;
  const Py_ssize_t found = PyUnstable_Long_CompactValue(integer);
  *value = static_cast<std::uint32_t>(found);
  return found >= 0;
#else
  *value = integer->ob_digit[0];
  return Py_SIZE(object) == 1 || (Py_SIZE(object) == 0 && *value == 0);
#endif
}

// The value of an int, or of what has __index__; -1 if it has more than 64 bits.
inline std::int64_t any_integer(PyObject* object) {
  const auto held = py::reinterpret_borrow<py::object>(object);  // the code may free it
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(held.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return overflow ? -1 : value;
}

inline py::dtype id_dtype(bool narrow) {
  return narrow ? py::dtype::of<std::uint16_t>() : py::dtype::of<std::uint32_t>();
}

// A new array of the ids.
inline py::array to_array(bool narrow, const std::uint32_t* ids, std::size_t count) {
  py::array out(id_dtype(narrow), count);
  write_ids(out.mutable_data(), narrow, ids, count);
  return out;
}

// A new array of `count` ids from place `begin` on.
inline py::array to_array(const IdArray& ids, std::size_t begin, std::size_t count) {
  py::array out(id_dtype(ids.id_bytes() == 2), count);
  std::memcpy(out.mutable_data(), ids.at(begin), count * ids.id_bytes());
  return out;
}

// An array over the memory of the ids.
inline py::array to_array(IdArray& ids) {
  const std::size_t count = ids.size();
  const bool narrow = ids.id_bytes() == 2;
  char* const data = ids.release();
  const py::capsule owner(data, [](void* memory) { std::free(memory); });
  return py::array(id_dtype(narrow), {count}, {narrow ? 2 : 4}, data, owner);
}

}  // namespace fastgpt
