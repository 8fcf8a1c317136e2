// Conversions, GIL release and exception mapping; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <system_error>

#include "tapct/b2nd.hpp"
#include "tapct/error.hpp"
#include "tapct/gpu.hpp"
#include "tapct/inflate.hpp"
#include "tapct/nifti.hpp"
#include "tapct/pixels.hpp"

namespace py = pybind11;

namespace {

using Volume = py::array_t<std::int16_t, py::array::c_style>;

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
    set_error("FormatError", py::make_tuple(error.field(), error.what()));
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

// The array shares the image's memory and keeps it alive.
py::array voxels_of(const std::shared_ptr<tapct::NiftiImage>& image) {
  const auto& dims = image->header.dims_xyz;
  auto* owner = new std::shared_ptr<tapct::NiftiImage>(image);
  const py::capsule base(owner, [](void* pointer) {
    delete static_cast<std::shared_ptr<tapct::NiftiImage>*>(pointer);
  });
  return py::array_t<std::int16_t>({dims[2], dims[1], dims[0]}, image->voxels().data(), base);
}

py::array_t<double> srow_of(const tapct::NiftiImage& image) {
  py::array_t<double> rows({3, 4});
  std::memcpy(rows.mutable_data(), image.header.srow.data(), sizeof(image.header.srow));
  return rows;
}

std::vector<std::uint32_t> write_b2nd(const std::string& path, const Volume& data_ZYX,
                                      const std::string& codec, int clevel,
                                      const tapct::Zyx& chunk_zyx, const tapct::Zyx& block_zyx) {
  if (data_ZYX.ndim() != 3) {
    throw std::invalid_argument("write_b2nd: data_ZYX must have three axes");
  }
  const tapct::Zyx shape_zyx{data_ZYX.shape(0), data_ZYX.shape(1), data_ZYX.shape(2)};
  const std::span<const std::int16_t> data(data_ZYX.data(),
                                           static_cast<std::size_t>(data_ZYX.size()));
  const py::gil_scoped_release release;
  return tapct::write_b2nd(path, data, shape_zyx, {codec, clevel, chunk_zyx, block_zyx});
}

Volume read_box(const std::string& path, const std::vector<std::uint32_t>& crc32s,
                const tapct::Zyx& lo_zyx, const tapct::Zyx& shape_zyx) {
  std::int64_t voxels = 1;
  for (const std::int64_t size : shape_zyx) {
    constexpr std::int64_t largest = std::int64_t{1} << 40;
    if (size < 1 || size > largest / voxels) {
      throw std::invalid_argument("read_box: shape_zyx must be positive");
    }
    voxels *= size;
  }
  Volume out({shape_zyx[0], shape_zyx[1], shape_zyx[2]});
  const std::span<std::int16_t> span(out.mutable_data(), static_cast<std::size_t>(out.size()));
  {
    const py::gil_scoped_release release;
    tapct::read_box(path, crc32s, lo_zyx, shape_zyx, span);
  }
  return out;
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native readers of tapct_fast; use tapct_fast.io instead.";
  py::register_exception_translator(&translate);
  m.attr("has_cuda") = static_cast<bool>(TAPCT_HAS_CUDA);

  using tapct::NiftiImage;
  py::class_<NiftiImage, std::shared_ptr<NiftiImage>>(
      m, "NiftiImage", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
      .def_property_readonly("data_ZYX", &voxels_of)
      .def_property_readonly("version", [](const NiftiImage& i) { return i.header.version; })
      .def_property_readonly("big_endian", [](const NiftiImage& i) { return i.header.big_endian; })
      .def_property_readonly(
          "dims_xyz", [](const NiftiImage& i) { return py::tuple(py::cast(i.header.dims_xyz)); })
      .def_property_readonly(
          "pixdim_xyz",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.header.pixdim_xyz)); })
      .def_property_readonly("qfac", [](const NiftiImage& i) { return i.header.qfac; })
      .def_property_readonly("xyzt_units", [](const NiftiImage& i) { return i.header.xyzt_units; })
      .def_property_readonly("datatype", [](const NiftiImage& i) { return i.header.datatype; })
      .def_property_readonly("slope", [](const NiftiImage& i) { return i.header.scl_slope; })
      .def_property_readonly("inter", [](const NiftiImage& i) { return i.header.scl_inter; })
      .def_property_readonly("rounded", [](const NiftiImage& i) { return i.rounded; })
      .def_property_readonly("qform_code", [](const NiftiImage& i) { return i.header.qform_code; })
      .def_property_readonly("sform_code", [](const NiftiImage& i) { return i.header.sform_code; })
      .def_property_readonly(
          "quaternion_bcd",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.header.quaternion_bcd)); })
      .def_property_readonly(
          "offset_xyz",
          [](const NiftiImage& i) { return py::tuple(py::cast(i.header.offset_xyz)); })
      .def_property_readonly("srow", &srow_of);

  m.def(
      "read_nifti",
      [](const std::string& path, std::uint64_t max_bytes) {
        const py::gil_scoped_release release;
        return std::make_shared<NiftiImage>(tapct::read_nifti(path, max_bytes));
      },
      py::arg("path"), py::arg("max_bytes"));
  m.def("write_b2nd", &write_b2nd, py::arg("path"), py::arg("data_ZYX").noconvert(),
        py::arg("codec"), py::arg("clevel"), py::arg("chunk_zyx"), py::arg("block_zyx"));
  m.def("read_box", &read_box, py::arg("path"), py::arg("crc32s"), py::arg("lo_zyx"),
        py::arg("shape_zyx"));
  define_hu_to_pixels<float>(m);
  define_hu_to_pixels<std::uint16_t>(m);  // the bits of bfloat16
  m.def("inflate_backend", &tapct::inflate_backend);
  m.def("blosc2_version", &tapct::blosc2_version);
  m.def("cuda_devices", &tapct::cuda_devices, py::call_guard<py::gil_scoped_release>());
}
