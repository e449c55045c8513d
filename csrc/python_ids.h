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
