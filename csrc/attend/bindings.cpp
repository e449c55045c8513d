// The Python module fastgpt._attend; see _attend.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "attend.h"

namespace py = pybind11;

namespace fastgpt {
namespace {

// A thread is worth starting for as many bytes of keys and values: 0.1 ms of work.
constexpr std::ptrdiff_t kBytesPerThread = 2 << 20;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// bfloat16 comes as the bits of a 16-bit integer.
template <class Element>
bool holds(const py::array& array) {
  const char type = array.dtype().char_();
  return std::is_same_v<Element, float> ? type == 'f' : type == 'h' || type == 'H';
}

// A row of elements for each row of the batch.
template <class Element>
Element* rows_of(const py::array& array, int rows) {
  require(holds<Element>(array), "q, k, v and out are not of the type of the cache");
  require(array.ndim() == 2 && array.shape(0) == rows, "q, k, v and out are not (B, heads * D)");
  require(array.strides(1) == array.itemsize(), "a row is not contiguous");
  return static_cast<Element*>(const_cast<void*>(array.data()));
}

template <class Element>
void set_cache(Step<Element>& step, const py::array& keys, const py::array& values) {
  for (const py::array* x : {&keys, &values}) {
    require(x->ndim() == 4, "keys and values are not (B, K, S, D)");
    require(x->flags() & py::array::c_style, "keys or values are not contiguous");
    require(holds<Element>(*x), "keys and values are not both float32 or both bfloat16");
    require(x->writeable(), "keys or values are read-only");
  }
  for (int axis = 0; axis < 4; ++axis) {
    require(keys.shape(axis) == values.shape(axis), "keys and values differ in shape");
  }
  step.rows = static_cast<int>(keys.shape(0));
  step.kv_heads = static_cast<int>(keys.shape(1));
  step.capacity = static_cast<int>(keys.shape(2));
  step.dim = static_cast<int>(keys.shape(3));
  require(step.dim > 0 && step.dim % 16 == 0 && step.dim <= kMostDim,
          "the width of a head is not a multiple of 16 up to 512");
  step.keys = static_cast<Element*>(const_cast<void*>(keys.data()));
  step.values = static_cast<Element*>(const_cast<void*>(values.data()));
}

template <class Element>
void set_tokens(Step<Element>& step, const py::array& q, const py::array& k, const py::array& v,
                const py::array& out) {
  step.q = rows_of<Element>(q, step.rows);
  step.k = rows_of<Element>(k, step.rows);
  step.v = rows_of<Element>(v, step.rows);
  step.out = rows_of<Element>(out, step.rows);
  step.q_stride = q.strides(0) / q.itemsize();
  step.k_stride = k.strides(0) / k.itemsize();
  step.v_stride = v.strides(0) / v.itemsize();
  step.heads = static_cast<int>(q.shape(1)) / step.dim;
  const py::ssize_t kv_width = py::ssize_t{step.kv_heads} * step.dim;
  require(step.kv_heads > 0 && step.heads > 0 && step.heads % step.kv_heads == 0 &&
              q.shape(1) == py::ssize_t{step.heads} * step.dim && k.shape(1) == kv_width &&
              v.shape(1) == kv_width,
          "the heads of q, k and v do not fit the cache");
  require(out.shape(1) == q.shape(1) && (out.flags() & py::array::c_style) && out.writeable(),
          "out is not like q");
}

using Table = std::optional<py::array_t<float, py::array::c_style>>;
using Starts = std::optional<py::array_t<std::int64_t, py::array::c_style>>;

template <class Element>
void set_places(Step<Element>& step, int place, const Starts& starts, int window, const Table& cos,
                const Table& sin) {
  require(place >= 0 && place < step.capacity, "the place is beyond the cache");
  require(window >= 0, "the window is negative");
  step.place = place;
  step.window = window;
  if (starts) {
    require(starts->ndim() == 1 && starts->shape(0) == step.rows, "starts are not (B)");
    step.starts = starts->data();
    for (int row = 0; row < step.rows; ++row) {
      require(step.starts[row] >= 0 && step.starts[row] <= place, "a row starts in the future");
    }
  }
  require(cos.has_value() == sin.has_value(), "cosines and sines come together");
  if (!cos) return;
  for (const Table* table : {&cos, &sin}) {
    require(
        (*table)->ndim() == 2 && (*table)->shape(0) > place && (*table)->shape(1) == step.dim / 2,
        "cosines and sines are not (S, D / 2)");
  }
  step.cos = cos->data();
  step.sin = sin->data();
}

template <class Element>
void run(const Step<Element>& step, AttendRows<Element> attend_rows, int threads) {
  const std::ptrdiff_t bytes =
      std::ptrdiff_t{2} * sizeof(Element) * step.rows * step.kv_heads * (step.place + 1) * step.dim;
  const auto most = std::min<std::ptrdiff_t>(bytes / kBytesPerThread, step.rows);
  const int parts = std::clamp(static_cast<int>(most), 1, resolve_threads(threads));
  const py::gil_scoped_release release;
  parallel_for(parts, parts, [&](std::size_t part, int) {
    std::vector<float> scores(step.place + 1);
    Step<Element> mine = step;
    mine.scores = scores.data();
    const auto cut = [&](std::size_t i) { return static_cast<int>(i * step.rows / parts); };
    attend_rows(mine, cut(part), cut(part + 1));
  });
}

const Attention& version_of(const std::string& name) {
  for (const Attention* version : attentions()) {
    if (name.empty() || name == version->name) return *version;
  }
  throw std::invalid_argument("this processor has no version " + name);
}

void attend(const py::array& q, const py::array& k, const py::array& v, const py::array& keys,
            const py::array& values, const py::array& out, int place, const Starts& starts,
            int window, const Table& cos, const Table& sin, float eps, float scale, int threads,
            const std::string& version) {
  const auto with = [&](auto step, auto attend_rows) {
    set_cache(step, keys, values);
    set_tokens(step, q, k, v, out);
    set_places(step, place, starts, window, cos, sin);
    step.eps = eps;
    step.scale = scale;
    run(step, attend_rows, threads);
  };
  static const Attention& fastest = version_of("");
  const Attention& chosen = version.empty() ? fastest : version_of(version);
  if (keys.itemsize() == sizeof(float)) {
    with(Step<float>{}, chosen.floats);
  } else {
    with(Step<BFloat16>{}, chosen.bfloats);
  }
}

std::vector<std::string> versions() {
  std::vector<std::string> names;
  for (const Attention* version : attentions()) names.push_back(version->name);
  return names;
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_attend, m) {
  using py::arg;
  m.def("versions", &fastgpt::versions);
  m.def("attend", &fastgpt::attend, arg("q"), arg("k"), arg("v"), arg("keys"), arg("values"),
        arg("out"), arg("place"), arg("starts"), arg("window"), arg("cos"), arg("sin"), arg("eps"),
        arg("scale"), arg("threads"), arg("version") = "");
}
