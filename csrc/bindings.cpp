// Conversions, GIL release and exception mapping; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <variant>

#include "tapct/attention_avx.hpp"
#include "tapct/b2nd.hpp"
#include "tapct/box_reader.hpp"
#include "tapct/deflate.hpp"
#include "tapct/dicom.hpp"
#include "tapct/error.hpp"
#include "tapct/gpu.hpp"
#include "tapct/inflate.hpp"
#include "tapct/matmul_amx.hpp"
#include "tapct/nifti.hpp"
#include "tapct/pixels.hpp"
#include "tapct/training_ops.hpp"
#include "tapct/views.hpp"
#include "tapct/vit_ops.hpp"
#include "tapct/voxels.hpp"

namespace py = pybind11;

namespace {

using Volume = py::array_t<std::int16_t, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

void set_error(const char* name, const py::tuple& arguments) {
  const py::object kind = py::module_::import("tapct_fast.errors").attr(name);
  const py::object error = kind(*arguments);
  PyErr_SetObject(kind.ptr(), error.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
  } catch (const tapct::FormatError& error) {
    set_error("FormatError", py::make_tuple(error.field(), error.what(), error.code()));
  } catch (const tapct::InputError& error) {
    set_error("InputError", py::make_tuple(error.what()));
  } catch (const tapct::StoreReadError& error) {
    set_error("StoreReadError", py::make_tuple(error.what()));
  } catch (const tapct::StoreError& error) {
    set_error("StoreError", py::make_tuple(error.what()));
  } catch (const tapct::DeviceError& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (const std::system_error& error) {
    // OSError picks FileNotFoundError, PermissionError... by errno; the path stays out of the
    // message.
    const py::object kind = py::reinterpret_borrow<py::object>(PyExc_OSError);
    const py::object raised = kind(error.code().value(), std::strerror(error.code().value()));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
  }
}

// An image and the array of the caller that holds its voxels, if one was given.
struct NiftiImage {
  tapct::NiftiImage image;
  py::object buffer;
};

// The array shares the image's memory and keeps it alive.
py::array voxels_of(const py::object& self) {
  const auto& image = self.cast<const NiftiImage&>().image;
  const auto& dims = image.header.dims_xyz;
  return py::array_t<std::int16_t>({dims[2], dims[1], dims[0]}, image.voxels.data(), self);
}

std::shared_ptr<NiftiImage> read_nifti(const std::string& path, std::uint64_t max_bytes,
                                       const std::optional<Bytes>& buffer, std::size_t threads) {
  tapct::NiftiOptions options{max_bytes, threads};
  if (buffer) {
    Bytes bytes = *buffer;
    options.buffer = std::as_writable_bytes(
        std::span(bytes.mutable_data(), static_cast<std::size_t>(bytes.size())));
  }
  auto read = std::make_shared<NiftiImage>();
  if (buffer) {
    read->buffer = *buffer;
  }
  const py::gil_scoped_release release;
  read->image = tapct::read_nifti(path, options);
  return read;
}

void write_gzip(const std::string& path, const Bytes& head, const Bytes& body, int level,
                std::size_t threads) {
  if (level < 1 || level > 9) {
    throw std::invalid_argument("write_gzip: level must be 1 to 9");
  }
  const auto bytes_of = [](const Bytes& array) {
    return std::as_bytes(std::span(array.data(), static_cast<std::size_t>(array.size())));
  };
  const auto head_bytes = bytes_of(head);
  const auto body_bytes = bytes_of(body);
  const py::gil_scoped_release release;
  tapct::write_gzip(path, head_bytes, body_bytes, level, threads);
}

std::span<std::int16_t> span_of(Volume& volume) {
  return {volume.mutable_data(), static_cast<std::size_t>(volume.size())};
}

void flip(Volume data_ZYX, const std::array<bool, 3>& axes_zyx) {
  if (data_ZYX.ndim() != 3) {
    throw std::invalid_argument("flip: data_ZYX must have three axes");
  }
  const auto size = [&](int axis) { return static_cast<std::size_t>(data_ZYX.shape(axis)); };
  const std::array<std::size_t, 3> shape_zyx{size(0), size(1), size(2)};
  const auto voxels = span_of(data_ZYX);
  const py::gil_scoped_release release;
  tapct::flip_voxels(voxels, shape_zyx, axes_zyx);
}

py::tuple hu_stats(const Volume& hu, std::int16_t low, std::int16_t high) {
  if (hu.size() == 0) {
    throw std::invalid_argument("hu_stats: there are no voxels");
  }
  const std::span<const std::int16_t> voxels(hu.data(), static_cast<std::size_t>(hu.size()));
  tapct::VoxelRange found;
  {
    const py::gil_scoped_release release;
    found = tapct::range_of(voxels, low, high);
  }
  return py::make_tuple(found.min, found.max, found.num_inside);
}

py::array_t<double> srow_of(const NiftiImage& read) {
  py::array_t<double> rows({3, 4});
  std::memcpy(rows.mutable_data(), read.image.header.srow.data(), sizeof(read.image.header.srow));
  return rows;
}

std::vector<std::uint32_t> write_b2nd(const std::string& path, const Volume& data_ZYX,
                                      const std::array<double, 16>& affine,
                                      const std::array<double, 3>& spacing_mm,
                                      const std::array<std::int16_t, 2>& hu_range,
                                      const py::bytes& source_sha256, const std::string& codec,
                                      int clevel, const tapct::Zyx& chunk_zyx,
                                      const tapct::Zyx& block_zyx) {
  if (data_ZYX.ndim() != 3) {
    throw std::invalid_argument("write_b2nd: data_ZYX must have three axes");
  }
  const std::string_view digest = source_sha256;
  tapct::VolumeMeta meta{affine, spacing_mm, hu_range, {}};
  if (digest.size() != meta.source_sha256.size()) {
    throw std::invalid_argument("write_b2nd: source_sha256 must have 32 bytes");
  }
  std::memcpy(meta.source_sha256.data(), digest.data(), digest.size());
  const tapct::Zyx shape_zyx{data_ZYX.shape(0), data_ZYX.shape(1), data_ZYX.shape(2)};
  const std::span<const std::int16_t> data(data_ZYX.data(),
                                           static_cast<std::size_t>(data_ZYX.size()));
  const py::gil_scoped_release release;
  return tapct::write_b2nd(path, data, shape_zyx, meta, {codec, clevel, chunk_zyx, block_zyx});
}

// A BoxReader and the Python bytes its checksums lie in.
struct Reader {
  py::list crc32s;
  std::unique_ptr<tapct::BoxReader> boxes;
};

std::unique_ptr<Reader> make_reader(const std::vector<std::string>& names,
                                    const std::vector<std::string>& paths, const py::list& crc32s,
                                    bool use_mmap, std::size_t max_open) {
  if (names.size() != paths.size() || names.size() != crc32s.size()) {
    throw std::invalid_argument("BoxReader: names, paths and crc32s are not of one length");
  }
  std::vector<tapct::StoreCase> cases;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const std::string_view view = py::cast<py::bytes>(crc32s[i]);
    if (view.empty() || max_open == 0) {
      throw std::invalid_argument("BoxReader: crc32s must not be empty, max_open not zero");
    }
    cases.push_back({names[i], paths[i], std::as_bytes(std::span(view.data(), view.size()))});
  }
  return std::make_unique<Reader>(
      Reader{py::list(crc32s), std::make_unique<tapct::BoxReader>(
                                   std::move(cases), tapct::BoxReaderOptions{use_mmap, max_open})});
}

using Indices = py::array_t<std::int64_t, py::array::c_style>;

// `out` is int16, or uint16 for bfloat16 bits; then `zscore` is low, high, mean, std.
void read_boxes(Reader& reader, const Indices& cases, const Indices& lo_Nzyx,
                const tapct::Zyx& shape_zyx, py::array& out,
                const std::optional<std::array<float, 4>>& zscore, std::size_t num_threads) {
  if (cases.ndim() != 1 || lo_Nzyx.ndim() != 2 || lo_Nzyx.shape(1) != 3 || !out.writeable() ||
      (out.flags() & py::array::c_style) == 0 ||
      !(zscore ? py::isinstance<py::array_t<std::uint16_t>>(out)
               : py::isinstance<py::array_t<std::int16_t>>(out))) {
    throw std::invalid_argument("read_boxes: arrays of a wrong shape, type or layout");
  }
  static_assert(sizeof(tapct::Zyx) == 3 * sizeof(std::int64_t));
  const auto* lo = reinterpret_cast<const tapct::Zyx*>(lo_Nzyx.data());
  tapct::BoxOutput output;
  const auto size = static_cast<std::size_t>(out.size());
  if (zscore) {
    output.bf16 = {static_cast<std::uint16_t*>(out.mutable_data()), size};
    output.zscore = {(*zscore)[0], (*zscore)[1], (*zscore)[2], (*zscore)[3]};
  } else {
    output.hu = {static_cast<std::int16_t*>(out.mutable_data()), size};
  }
  const std::span<const std::int64_t> indices(cases.data(), static_cast<std::size_t>(cases.size()));
  const std::span<const tapct::Zyx> corners(lo, static_cast<std::size_t>(lo_Nzyx.shape(0)));
  const py::gil_scoped_release release;
  reader.boxes->read(indices, corners, shape_zyx, output, num_threads);
}

// A path, or a file's content: the buffer must outlive the source.
tapct::DicomSource dicom_source(const py::handle& source, std::vector<py::buffer_info>& buffers) {
  if (py::isinstance<py::str>(source) || py::isinstance<py::bytes>(source)) {
    return source.cast<std::string>();
  }
  buffers.push_back(py::reinterpret_borrow<py::buffer>(source).request());
  const py::buffer_info& buffer = buffers.back();
  if (buffer.ndim != 1 || buffer.itemsize != 1 || buffer.strides[0] != 1) {
    throw std::invalid_argument("a file in memory must be contiguous bytes");
  }
  return std::span(static_cast<const std::byte*>(buffer.ptr),
                   static_cast<std::size_t>(buffer.size));
}

std::vector<tapct::DicomScan> scan_dicom(
    const py::list& sources, const std::vector<std::pair<std::string, std::uint32_t>>& tags,
    std::size_t threads) {
  std::vector<tapct::DicomTag> wanted;
  for (const auto& [keyword, tag] : tags) {
    wanted.push_back({keyword, tag});
  }
  std::vector<py::buffer_info> buffers;
  std::vector<tapct::DicomSource> files;
  for (const py::handle& source : sources) {
    files.push_back(dicom_source(source, buffers));
  }
  const py::gil_scoped_release release;
  return tapct::scan_dicom(files, wanted, threads);
}

py::dict dicom_values(const tapct::DicomScan& scan) {
  py::dict values;
  for (const tapct::DicomValue& value : scan.header.values) {
    values[py::str(value.keyword)] = py::make_tuple(value.vr, py::bytes(value.bytes));
  }
  return values;
}

void read_slices(Volume& out_ZYX, const py::list& slices, std::size_t threads) {
  if (out_ZYX.ndim() != 3) {
    throw std::invalid_argument("read_slices: out_ZYX must have three axes");
  }
  std::vector<bool> is_taken(static_cast<std::size_t>(out_ZYX.shape(0)));
  std::vector<py::buffer_info> buffers;
  std::vector<tapct::StoredSlice> stored;
  for (const py::handle& slice : slices) {
    const auto optional = [&](const char* name) {
      return slice.attr(name).cast<std::optional<std::uint64_t>>();
    };
    stored.push_back({
        .source = dicom_source(slice.attr("source"), buffers),
        .place = slice.attr("place").cast<std::string>(),
        .index = slice.attr("index").cast<std::size_t>(),
        .pixel_offset = slice.attr("pixel_offset").cast<std::uint64_t>(),
        .pixel_bytes = slice.attr("pixel_bytes").cast<std::uint64_t>(),
        .deflated_at = optional("deflated_at"),
        .big_endian = slice.attr("is_big_endian").cast<bool>(),
        .is_signed = slice.attr("is_signed").cast<bool>(),
        .bits_stored = slice.attr("bits_stored").cast<unsigned>(),
        .padding = slice.attr("padding").cast<std::optional<std::uint16_t>>(),
        .slope = slice.attr("slope").cast<double>(),
        .intercept = slice.attr("intercept").cast<double>(),
    });
    if (stored.back().bits_stored < 1 || stored.back().bits_stored > 16) {
      throw std::invalid_argument("read_slices: bits_stored must be 1..16");
    }
    // Threads write the slices: two of them in one place would race.
    const std::size_t index = stored.back().index;
    if (index >= is_taken.size() || is_taken[index]) {
      throw std::invalid_argument("read_slices: each index must be one free place of out_ZYX");
    }
    is_taken[index] = true;
  }
  const std::span<std::int16_t> out(out_ZYX.mutable_data(),
                                    static_cast<std::size_t>(out_ZYX.size()));
  const auto pixels = static_cast<std::size_t>(out_ZYX.shape(1) * out_ZYX.shape(2));
  const py::gil_scoped_release release;
  tapct::read_slices(stored, pixels, out, threads);
}

template <std::size_t N, typename T>
std::array<std::size_t, N> shape_of(const py::array_t<T, py::array::c_style>& array,
                                    const char* message) {
  if (array.ndim() != static_cast<py::ssize_t>(N)) {
    throw std::invalid_argument(message);
  }
  std::array<std::size_t, N> shape{};
  std::transform(array.shape(), array.shape() + N, shape.begin(),
                 [](py::ssize_t size) { return static_cast<std::size_t>(size); });
  return shape;
}

template <typename Pixel>
void hu_to_pixels(const Volume& hu_ZYX, py::array_t<Pixel, py::array::c_style>& out_ZYX,
                  const std::array<std::size_t, 2>& resize_yx, bool antialias, float pad_hu,
                  const std::array<float, 2>& clip, float mean, float std,
                  std::size_t num_threads) {
  const tapct::Shape hu_shape = shape_of<3>(hu_ZYX, "hu_to_pixels: hu_ZYX must have three axes");
  const tapct::Shape out_shape = shape_of<3>(out_ZYX, "hu_to_pixels: out_ZYX must have three axes");
  const std::span<const std::int16_t> hu(hu_ZYX.data(), static_cast<std::size_t>(hu_ZYX.size()));
  const std::span<Pixel> out(out_ZYX.mutable_data(), static_cast<std::size_t>(out_ZYX.size()));
  const tapct::PixelOptions options{
      resize_yx, antialias, pad_hu, {clip[0], clip[1], mean, std}, num_threads};
  const py::gil_scoped_release release;
  tapct::hu_to_pixels(hu, hu_shape, options, out, out_shape);
}

template <typename Pixel>
void define_hu_to_pixels(py::module_& m) {
  m.def("hu_to_pixels", &hu_to_pixels<Pixel>, py::arg("hu_ZYX").noconvert(),
        py::arg("out_ZYX").noconvert(), py::arg("resize_yx"), py::arg("antialias"),
        py::arg("pad_hu"), py::arg("clip"), py::arg("mean"), py::arg("std"),
        py::arg("num_threads"));
}

using Params = py::array_t<float, py::array::c_style>;

// View (v, b) of the arrays shows box b; a row of params is lo, hi, window, gamma, contrast, sigma,
// noise_std.
std::vector<tapct::ViewJob> view_jobs(const std::vector<std::array<std::size_t, 3>>& shapes,
                                      const std::vector<const std::int16_t*>& hu,
                                      const Params& params_VBP,
                                      const py::array_t<std::uint64_t, py::array::c_style>& keys_VB,
                                      const Bytes& turns_VB, char* out, std::size_t view_bytes) {
  constexpr std::size_t num_params = 14;
  const auto shape = shape_of<3>(params_VBP, "render_views: params_VBP must have three axes");
  const std::array<std::size_t, 2> views{shape[0], shape[1]};
  if (shape[2] != num_params || hu.size() != shape[1] ||
      shape_of<2>(keys_VB, "render_views: keys_VB must have two axes") != views ||
      shape_of<2>(turns_VB, "render_views: turns_VB must have two axes") != views) {
    throw std::invalid_argument("render_views: boxes, params, keys and turns do not agree");
  }
  std::vector<tapct::ViewJob> jobs;
  for (std::size_t i = 0; i < shape[0] * shape[1]; ++i) {
    const float* p = params_VBP.data() + i * num_params;
    const tapct::View view{{p[0], p[1], p[2]},
                           {p[3], p[4], p[5]},
                           {p[6], p[7]},
                           p[8],
                           p[9],
                           {p[10], p[11], p[12]},
                           p[13],
                           keys_VB.data()[i],
                           turns_VB.data()[i]};
    jobs.push_back({hu[i % shape[1]], shapes[i % shape[1]], view, out + i * view_bytes});
  }
  return jobs;
}

template <typename Pixel>
void render_views(const std::vector<Volume>& boxes, const Params& params_VBP,
                  const py::array_t<std::uint64_t, py::array::c_style>& keys_VB,
                  const Bytes& turns_VB, py::array_t<Pixel, py::array::c_style>& out_VBZYX,
                  bool antialias, const std::array<float, 2>& clip, float mean, float std,
                  std::size_t num_threads) {
  std::vector<std::array<std::size_t, 3>> shapes;
  std::vector<const std::int16_t*> hu;
  for (const Volume& box : boxes) {
    shapes.push_back(shape_of<3>(box, "render_views: a box must have three axes"));
    hu.push_back(box.data());
  }
  const auto [num_views, num_boxes, z, y, x] =
      shape_of<5>(out_VBZYX, "render_views: out_VBZYX must have five axes");
  if (num_views != static_cast<std::size_t>(keys_VB.shape(0)) || num_boxes != boxes.size()) {
    throw std::invalid_argument("render_views: out_VBZYX does not have the views and boxes given");
  }
  const auto jobs =
      view_jobs(shapes, hu, params_VBP, keys_VB, turns_VB,
                reinterpret_cast<char*>(out_VBZYX.mutable_data()), z * y * x * sizeof(Pixel));
  const tapct::ViewOptions options{
      {z, y, x}, antialias, {clip[0], clip[1], mean, std}, num_threads};
  const py::gil_scoped_release release;
  tapct::render_views<Pixel>(jobs, options);
}

// Addresses are of device memory: boxes of shapes_zyx, out_VBZYX of size_zyx per view, scratch.
void render_views_gpu(const std::vector<std::uintptr_t>& boxes,
                      const std::vector<std::array<std::size_t, 3>>& shapes_zyx,
                      const Params& params_VBP,
                      const py::array_t<std::uint64_t, py::array::c_style>& keys_VB,
                      const Bytes& turns_VB, std::uintptr_t out,
                      const std::array<std::size_t, 3>& size_zyx, bool is_bf16, bool antialias,
                      const std::array<float, 2>& clip, float mean, float std,
                      std::uintptr_t scratch, std::size_t num_scratch, std::uintptr_t stream) {
  if (boxes.size() != shapes_zyx.size()) {
    throw std::invalid_argument("render_views_gpu: boxes and shapes_zyx are not of one length");
  }
  std::vector<const std::int16_t*> hu;
  for (const std::uintptr_t box : boxes) {
    hu.push_back(reinterpret_cast<const std::int16_t*>(box));
  }
  const std::size_t pixel_bytes = is_bf16 ? sizeof(std::uint16_t) : sizeof(float);
  const auto jobs =
      view_jobs(shapes_zyx, hu, params_VBP, keys_VB, turns_VB, reinterpret_cast<char*>(out),
                size_zyx[0] * size_zyx[1] * size_zyx[2] * pixel_bytes);
  const tapct::ViewOptions options{size_zyx, antialias, {clip[0], clip[1], mean, std}, 1};
  const py::gil_scoped_release release;
  tapct::render_views_gpu(jobs, options, is_bf16, reinterpret_cast<float*>(scratch), num_scratch,
                          reinterpret_cast<void*>(stream));
}

template <typename Pixel>
void define_render_views(py::module_& m) {
  m.def("render_views", &render_views<Pixel>, py::arg("boxes").noconvert(),
        py::arg("params_VBP").noconvert(), py::arg("keys_VB").noconvert(),
        py::arg("turns_VB").noconvert(), py::arg("out_VBZYX").noconvert(), py::arg("antialias"),
        py::arg("clip"), py::arg("mean"), py::arg("std"), py::arg("num_threads"));
}

using Bf16 = py::array_t<std::uint16_t, py::array::c_style>;

template <typename Array>
std::array<std::size_t, 3> attention_shape(const Array& qkv_NT3HK, const Array& out_NTHK,
                                           const Params& level_NHT) {
  const auto shape = shape_of<5>(qkv_NT3HK, "attention: qkv_NT3HK must have five axes");
  const auto out = shape_of<4>(out_NTHK, "attention: out_NTHK must have four axes");
  const auto level = shape_of<3>(level_NHT, "attention: level_NHT must have three axes");
  const auto [volumes, tokens, three, heads, width] = shape;
  if (three != 3 || width != tapct::head_width ||
      out != std::array<std::size_t, 4>{volumes, tokens, heads, width} ||
      level != std::array<std::size_t, 3>{volumes, heads, tokens}) {
    throw std::invalid_argument(
        "attention: the arrays are not (N, T, 3, H, 64), (N, T, H, 64), (N, H, T)");
  }
  return {volumes, tokens, heads};
}

template <typename Array, auto kernel, typename... Options>
void attention(const Array& qkv_NT3HK, Array& out_NTHK, Params& level_NHT, std::size_t num_threads,
               Options... options) {
  const auto [volumes, tokens, heads] = attention_shape(qkv_NT3HK, out_NTHK, level_NHT);
  const auto* qkv = qkv_NT3HK.data();
  auto* out = out_NTHK.mutable_data();
  float* levels = level_NHT.mutable_data();
  const py::gil_scoped_release release;
  kernel(qkv, out, levels, volumes, tokens, heads, num_threads, options...);
}

template <typename Array, auto kernel, typename... Options>
void attention_backward(const Array& grad_out_NTHK, const Array& qkv_NT3HK, const Array& out_NTHK,
                        const Params& level_NHT, Array& grad_qkv_NT3HK, std::size_t num_threads,
                        Options... options) {
  const auto [volumes, tokens, heads] = attention_shape(qkv_NT3HK, out_NTHK, level_NHT);
  attention_shape(grad_qkv_NT3HK, grad_out_NTHK, level_NHT);
  const auto* grad_out = grad_out_NTHK.data();
  const auto* qkv = qkv_NT3HK.data();
  const auto* out = out_NTHK.data();
  const float* levels = level_NHT.data();
  auto* grad_qkv = grad_qkv_NT3HK.mutable_data();
  const py::gil_scoped_release release;
  kernel(grad_out, qkv, out, levels, grad_qkv, volumes, tokens, heads, num_threads, options...);
}

template <typename Array, auto forward, auto backward, typename... Options>
void define_attention(py::module_& m, const std::string& name, const auto&... options) {
  m.def(name.c_str(), &attention<Array, forward, Options...>, py::arg("qkv_NT3HK").noconvert(),
        py::arg("out_NTHK").noconvert(), py::arg("level_NHT").noconvert(), py::arg("num_threads"),
        options...);
  m.def((name + "_backward").c_str(), &attention_backward<Array, backward, Options...>,
        py::arg("grad_out_NTHK").noconvert(), py::arg("qkv_NT3HK").noconvert(),
        py::arg("out_NTHK").noconvert(), py::arg("level_NHT").noconvert(),
        py::arg("grad_qkv_NT3HK").noconvert(), py::arg("num_threads"), options...);
}

void add_norm(Params& x_ND, const std::optional<Bf16>& branch_ND, const Params& weight_D,
              const Params& bias_D, float eps, Bf16& out_ND, std::size_t num_threads) {
  const auto shape = shape_of<2>(x_ND, "add_norm: x_ND must have two axes");
  const std::array<std::size_t, 1> width{shape[1]};
  if (shape_of<2>(out_ND, "add_norm: out_ND must have two axes") != shape ||
      (branch_ND && shape_of<2>(*branch_ND, "add_norm: branch_ND must have two axes") != shape) ||
      shape_of<1>(weight_D, "add_norm: weight_D must have one axis") != width ||
      shape_of<1>(bias_D, "add_norm: bias_D must have one axis") != width) {
    throw std::invalid_argument("add_norm: the arrays do not have one shape");
  }
  float* x = x_ND.mutable_data();
  const std::uint16_t* branch = branch_ND ? branch_ND->data() : nullptr;
  std::uint16_t* out = out_ND.mutable_data();
  const float* weight = weight_D.data();
  const float* bias = bias_D.data();
  const py::gil_scoped_release release;
  tapct::add_norm(x, branch, weight, bias, eps, out, shape[0], shape[1], num_threads);
}

void gelu(Bf16& x, std::size_t num_threads) {
  std::uint16_t* values = x.mutable_data();
  const auto count = static_cast<std::size_t>(x.size());
  const py::gil_scoped_release release;
  tapct::gelu(values, count, num_threads);
}

// One axis must be contiguous.
tapct::Matrix matrix_of(const py::array_t<float>& array) {
  constexpr py::ssize_t size = sizeof(float);
  if (array.ndim() == 2) {
    for (const bool is_transposed : {false, true}) {
      const py::ssize_t rows = array.shape(is_transposed), columns = array.shape(!is_transposed);
      const py::ssize_t stride = array.strides(is_transposed);
      if ((columns <= 1 || array.strides(!is_transposed) == size) &&
          (rows <= 1 || (stride % size == 0 && stride >= columns * size))) {
        return {array.data(), static_cast<std::size_t>(array.shape(0)),
                static_cast<std::size_t>(array.shape(1)),
                rows <= 1 ? 0 : static_cast<std::size_t>(stride / size), is_transposed};
      }
    }
  }
  throw std::invalid_argument("matmul_amx: a factor must be a matrix with one contiguous axis");
}

void matmul_amx(const py::array_t<float>& a_MK, const py::array_t<float>& b_KN,
                const std::optional<Params>& bias_N, Params& out_MN, std::size_t pieces,
                std::size_t num_threads) {
  const tapct::Matrix a = matrix_of(a_MK), b = matrix_of(b_KN);
  const std::array<std::size_t, 1> width{b.columns};
  if (a.columns != b.rows ||
      shape_of<2>(out_MN, "matmul_amx: out_MN must have two axes") !=
          std::array<std::size_t, 2>{a.rows, b.columns} ||
      (bias_N && shape_of<1>(*bias_N, "matmul_amx: bias_N must have one axis") != width)) {
    throw std::invalid_argument("matmul_amx: the arrays are not (M, K), (K, N), (N), (M, N)");
  }
  const float* bias = bias_N ? bias_N->data() : nullptr;
  float* out = out_MN.mutable_data();
  const py::gil_scoped_release release;
  tapct::matmul_amx(a, b, bias, out, pieces, num_threads);
}

using Either = std::variant<Params, Bf16>;

tapct::Values values_of(const Either& array) {
  return std::visit([](const auto& a) -> tapct::Values { return a.data(); }, array);
}

tapct::MutableValues mutable_values_of(Either& array) {
  return std::visit([](auto& a) -> tapct::MutableValues { return a.mutable_data(); }, array);
}

void bias_gelu(const Params& x_ND, const Params& bias_D, Params& out_ND, std::size_t num_threads) {
  const auto shape = shape_of<2>(x_ND, "bias_gelu: x_ND must have two axes");
  if (shape_of<2>(out_ND, "bias_gelu: out_ND must have two axes") != shape ||
      shape_of<1>(bias_D, "bias_gelu: bias_D must have one axis")[0] != shape[1]) {
    throw std::invalid_argument("bias_gelu: the arrays do not have one shape");
  }
  const float* x = x_ND.data();
  const float* bias = bias_D.data();
  float* out = out_ND.mutable_data();
  const py::gil_scoped_release release;
  tapct::bias_gelu(x, bias, out, shape[0], shape[1], num_threads);
}

void bias_gelu_backward(const Params& grad_ND, const Params& x_ND, const Params& bias_D,
                        Params& grad_x_ND, Params& grad_bias_D, std::size_t num_threads) {
  const auto shape = shape_of<2>(x_ND, "bias_gelu_backward: x_ND must have two axes");
  if (shape_of<2>(grad_ND, "bias_gelu_backward: grad_ND must have two axes") != shape ||
      shape_of<2>(grad_x_ND, "bias_gelu_backward: grad_x_ND must have two axes") != shape ||
      shape_of<1>(bias_D, "bias_gelu_backward: bias_D must have one axis")[0] != shape[1] ||
      shape_of<1>(grad_bias_D, "bias_gelu_backward: grad_bias_D must have one axis")[0] !=
          shape[1]) {
    throw std::invalid_argument("bias_gelu_backward: the arrays do not have one shape");
  }
  const float* grad = grad_ND.data();
  const float* x = x_ND.data();
  const float* bias = bias_D.data();
  float* grad_x = grad_x_ND.mutable_data();
  float* grad_bias = grad_bias_D.mutable_data();
  const py::gil_scoped_release release;
  tapct::bias_gelu_backward(grad, x, bias, grad_x, grad_bias, shape[0], shape[1], num_threads);
}

using Index = std::optional<py::array_t<std::int64_t, py::array::c_style>>;
using MaybeParams = std::optional<Params>;
using MaybeEither = std::optional<Either>;

tapct::Listed listed(const Index& index) {
  if (!index) {
    return {false, {}};
  }
  return {true, {index->data(), shape_of<1>(*index, "residual_norm: an index has one axis")[0]}};
}

const float* data_of(const MaybeParams& array) { return array ? array->data() : nullptr; }

tapct::Values values_of(const MaybeEither& array) {
  return array ? values_of(*array) : tapct::Values{};
}

tapct::MutableValues mutable_values_of(MaybeEither& array) {
  return array ? mutable_values_of(*array) : tapct::MutableValues{};
}

std::size_t size_of(const Params& array) { return static_cast<std::size_t>(array.size()); }

std::size_t size_of(const Either& array) {
  return std::visit([](const auto& a) { return static_cast<std::size_t>(a.size()); }, array);
}

// Whether an array, where there is one, holds what the op reads or writes of it.
template <typename Array>
bool has_rows(const std::optional<Array>& array, const tapct::Listed& samples,
              const tapct::ResidualNorm& op) {
  const std::size_t count = samples.is_listed ? samples.samples.size() : op.num_samples;
  return !array || size_of(*array) == count * op.num_tokens * op.width;
}

bool has_width(const MaybeParams& array, std::size_t width) {
  return !array || size_of(*array) == width;
}

tapct::ResidualNorm residual_norm_of(const Params& x_NTD, const MaybeEither& branch_KTD,
                                     const MaybeParams& gamma_D, const MaybeParams& weight_D,
                                     const Index& index_K, const Index& next_index_J, float scale,
                                     float eps) {
  const auto shape = shape_of<3>(x_NTD, "residual_norm: x_NTD must have three axes");
  if (!has_width(gamma_D, shape[2]) || !has_width(weight_D, shape[2])) {
    throw std::invalid_argument("residual_norm: gamma, weight and x differ in width");
  }
  return {shape[0],
          shape[1],
          shape[2],
          listed(index_K),
          listed(next_index_J),
          scale,
          eps,
          branch_KTD.has_value(),
          data_of(gamma_D),
          data_of(weight_D)};
}

void residual_norm(const Params& x_NTD, const MaybeEither& branch_KTD, const MaybeParams& gamma_D,
                   const MaybeParams& weight_D, const MaybeParams& bias_D, const Index& index_K,
                   const Index& next_index_J, float scale, float eps, MaybeParams out_NTD,
                   MaybeEither normed_JTD, std::size_t num_threads) {
  const auto op =
      residual_norm_of(x_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J, scale, eps);
  if (branch_KTD.has_value() != out_NTD.has_value() || weight_D.has_value() != bias_D.has_value() ||
      weight_D.has_value() != normed_JTD.has_value() || !has_width(bias_D, op.width) ||
      !has_rows(branch_KTD, op.with_branch, op) || !has_rows(out_NTD, {false, {}}, op) ||
      !has_rows(normed_JTD, op.with_norm, op)) {
    throw std::invalid_argument("residual_norm: the arrays do not fit each other");
  }
  const float* x = x_NTD.data();
  const auto branch = values_of(branch_KTD);
  const float* bias = data_of(bias_D);
  float* out = out_NTD ? out_NTD->mutable_data() : nullptr;
  const auto normed = mutable_values_of(normed_JTD);
  const py::gil_scoped_release release;
  tapct::residual_norm(op, x, branch, bias, out, normed, num_threads);
}

void residual_norm_backward(const MaybeParams& grad_out_NTD, const MaybeEither& grad_normed_JTD,
                            const Params& read_NTD, const MaybeEither& branch_KTD,
                            const MaybeParams& gamma_D, const MaybeParams& weight_D,
                            const Index& index_K, const Index& next_index_J, float scale, float eps,
                            Params& grad_x_NTD, MaybeEither grad_branch_KTD, Params& grads_3D,
                            std::size_t num_threads) {
  const auto op =
      residual_norm_of(read_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J, scale, eps);
  if (branch_KTD.has_value() != grad_out_NTD.has_value() ||
      branch_KTD.has_value() != grad_branch_KTD.has_value() ||
      weight_D.has_value() != grad_normed_JTD.has_value() || size_of(grads_3D) != 3 * op.width ||
      !has_rows(branch_KTD, op.with_branch, op) || !has_rows(grad_branch_KTD, op.with_branch, op) ||
      !has_rows(grad_out_NTD, {false, {}}, op) || size_of(grad_x_NTD) != size_of(read_NTD) ||
      !has_rows(grad_normed_JTD, op.with_norm, op)) {
    throw std::invalid_argument("residual_norm_backward: the arrays do not fit each other");
  }
  const float* grad_out = data_of(grad_out_NTD);
  const auto grad_normed = values_of(grad_normed_JTD);
  const float* read = read_NTD.data();
  const auto branch = values_of(branch_KTD);
  const tapct::ResidualNormGrads grads{grad_x_NTD.mutable_data(),
                                       mutable_values_of(grad_branch_KTD), grads_3D.mutable_data()};
  const py::gil_scoped_release release;
  tapct::residual_norm_backward(op, grad_out, grad_normed, read, branch, grads, num_threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native readers of tapct_fast; use tapct_fast.io instead.";
  py::register_exception_translator(&translate);
  m.attr("has_cuda") = static_cast<bool>(TAPCT_HAS_CUDA);
  m.def("has_amx", &tapct::has_amx);
  m.def("has_avx2", &tapct::has_avx2);
  m.def("has_avx512_bf16", &tapct::has_avx512_bf16);
  define_attention<Bf16, tapct::attention_amx, tapct::attention_amx_backward>(m, "attention_amx");
  define_attention<Params, tapct::attention_avx, tapct::attention_avx_backward, std::size_t>(
      m, "attention_avx", py::arg("lanes") = 0);
  m.def("matmul_amx", &matmul_amx, py::arg("a_MK").noconvert(), py::arg("b_KN").noconvert(),
        py::arg("bias_N").noconvert(), py::arg("out_MN").noconvert(), py::arg("pieces"),
        py::arg("num_threads"));
  m.def("add_norm", &add_norm, py::arg("x_ND").noconvert(), py::arg("branch_ND").noconvert(),
        py::arg("weight_D").noconvert(), py::arg("bias_D").noconvert(), py::arg("eps"),
        py::arg("out_ND").noconvert(), py::arg("num_threads"));
  m.def("gelu", &gelu, py::arg("x").noconvert(), py::arg("num_threads"));
  m.def("bias_gelu", &bias_gelu, py::arg("x_ND").noconvert(), py::arg("bias_D").noconvert(),
        py::arg("out_ND").noconvert(), py::arg("num_threads"));
  m.def("bias_gelu_backward", &bias_gelu_backward, py::arg("grad_ND").noconvert(),
        py::arg("x_ND").noconvert(), py::arg("bias_D").noconvert(),
        py::arg("grad_x_ND").noconvert(), py::arg("grad_bias_D").noconvert(),
        py::arg("num_threads"));
  m.def("residual_norm", &residual_norm, py::arg("x_NTD").noconvert(),
        py::arg("branch_KTD").noconvert(), py::arg("gamma_D").noconvert(),
        py::arg("weight_D").noconvert(), py::arg("bias_D").noconvert(),
        py::arg("index_K").noconvert(), py::arg("next_index_J").noconvert(), py::arg("scale"),
        py::arg("eps"), py::arg("out_NTD").noconvert(), py::arg("normed_JTD").noconvert(),
        py::arg("num_threads"));
  m.def("residual_norm_backward", &residual_norm_backward, py::arg("grad_out_NTD").noconvert(),
        py::arg("grad_normed_JTD").noconvert(), py::arg("read_NTD").noconvert(),
        py::arg("branch_KTD").noconvert(), py::arg("gamma_D").noconvert(),
        py::arg("weight_D").noconvert(), py::arg("index_K").noconvert(),
        py::arg("next_index_J").noconvert(), py::arg("scale"), py::arg("eps"),
        py::arg("grad_x_NTD").noconvert(), py::arg("grad_branch_KTD").noconvert(),
        py::arg("grads_3D").noconvert(), py::arg("num_threads"));

  py::class_<NiftiImage, std::shared_ptr<NiftiImage>>(
      m, "NiftiImage", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
      .def_property_readonly("data_ZYX", &voxels_of)
      .def_property_readonly("version", [](const NiftiImage& i) { return i.image.header.version; })
      .def_property_readonly("big_endian",
                             [](const NiftiImage& i) { return i.image.header.big_endian; })
      .def_property_readonly(
          "dims_xyz",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.image.header.dims_xyz)); })
      .def_property_readonly(
          "pixdim_xyz",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.image.header.pixdim_xyz)); })
      .def_property_readonly("qfac", [](const NiftiImage& i) { return i.image.header.qfac; })
      .def_property_readonly("xyzt_units",
                             [](const NiftiImage& i) { return i.image.header.xyzt_units; })
      .def_property_readonly("datatype",
                             [](const NiftiImage& i) { return i.image.header.datatype; })
      .def_property_readonly("slope", [](const NiftiImage& i) { return i.image.header.scl_slope; })
      .def_property_readonly("inter", [](const NiftiImage& i) { return i.image.header.scl_inter; })
      .def_property_readonly("rounded", [](const NiftiImage& i) { return i.image.rounded; })
      .def_property_readonly("num_members", [](const NiftiImage& i) { return i.image.num_members; })
      .def_property_readonly("has_lone_inter",
                             [](const NiftiImage& i) { return i.image.header.has_lone_inter; })
      .def_property_readonly("qform_code",
                             [](const NiftiImage& i) { return i.image.header.qform_code; })
      .def_property_readonly("sform_code",
                             [](const NiftiImage& i) { return i.image.header.sform_code; })
      .def_property_readonly(
          "quaternion_bcd",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.image.header.quaternion_bcd)); })
      .def_property_readonly(
          "offset_xyz",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.image.header.offset_xyz)); })
      .def_property_readonly("srow", &srow_of);

  m.def("read_nifti", &read_nifti, py::arg("path"), py::arg("max_bytes"),
        py::arg("buffer").noconvert() = py::none(), py::arg("threads") = 1);
  m.def("write_gzip", &write_gzip, py::arg("path"), py::arg("head").noconvert(),
        py::arg("body").noconvert(), py::arg("level"), py::arg("threads"));
  m.def("flip", &flip, py::arg("data_ZYX").noconvert(), py::arg("axes_zyx"));
  m.def("hu_stats", &hu_stats, py::arg("hu").noconvert(), py::arg("low"), py::arg("high"));
  m.def("write_b2nd", &write_b2nd, py::arg("path"), py::arg("data_ZYX").noconvert(),
        py::arg("affine"), py::arg("spacing_mm"), py::arg("hu_range"), py::arg("source_sha256"),
        py::arg("codec"), py::arg("clevel"), py::arg("chunk_zyx"), py::arg("block_zyx"));

  using tapct::DicomScan;
  py::class_<DicomScan>(m, "DicomScan", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
      .def_readonly("has_mark", &DicomScan::has_mark)
      .def_property_readonly("start", [](const DicomScan& s) { return py::bytes(s.start); })
      .def_readonly("field", &DicomScan::field)
      .def_readonly("reason", &DicomScan::reason)
      .def_readonly("code", &DicomScan::code)
      .def_readonly("os_error", &DicomScan::os_error)
      .def_property_readonly("values", &dicom_values)
      .def_property_readonly("transfer_syntax",
                             [](const DicomScan& s) { return s.header.transfer_syntax; })
      .def_property_readonly("is_big_endian",
                             [](const DicomScan& s) { return s.header.big_endian; })
      .def_property_readonly("deflated_at", [](const DicomScan& s) { return s.header.deflated_at; })
      .def_property_readonly("num_bytes", [](const DicomScan& s) { return s.header.num_bytes; })
      .def_property_readonly("pixel_offset",
                             [](const DicomScan& s) { return s.header.pixel_offset; })
      .def_property_readonly("pixel_bytes",
                             [](const DicomScan& s) { return s.header.pixel_bytes; });
  m.def("scan_dicom", &scan_dicom, py::arg("sources"), py::arg("tags"), py::arg("threads"));
  m.def("read_slices", &read_slices, py::arg("out_ZYX").noconvert(), py::arg("slices"),
        py::arg("threads"));
  define_hu_to_pixels<float>(m);
  define_hu_to_pixels<std::uint16_t>(m);  // the bits of bfloat16
  define_render_views<float>(m);
  define_render_views<std::uint16_t>(m);
  m.def("render_views_gpu", &render_views_gpu, py::arg("boxes"), py::arg("shapes_zyx"),
        py::arg("params_VBP").noconvert(), py::arg("keys_VB").noconvert(),
        py::arg("turns_VB").noconvert(), py::arg("out"), py::arg("size_zyx"), py::arg("is_bf16"),
        py::arg("antialias"), py::arg("clip"), py::arg("mean"), py::arg("std"), py::arg("scratch"),
        py::arg("num_scratch"), py::arg("stream"));
  py::class_<Reader>(m, "BoxReader", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
      .def(py::init(&make_reader), py::arg("names"), py::arg("paths"), py::arg("crc32s"),
           py::arg("use_mmap"), py::arg("max_open"))
      .def("read_boxes", &read_boxes, py::arg("cases").noconvert(), py::arg("lo_Nzyx").noconvert(),
           py::arg("shape_zyx"), py::arg("out").noconvert(), py::arg("zscore"),
           py::arg("num_threads"));
  m.def("inflate_backend", &tapct::inflate_backend);
  m.def("blosc2_version", &tapct::blosc2_version);
  m.def("cuda_devices", &tapct::cuda_devices, py::call_guard<py::gil_scoped_release>());
}
