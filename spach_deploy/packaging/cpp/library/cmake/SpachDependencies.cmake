# The targets Spach::TensorRT and CUDA::cudart. Define either yourself beforehand to bring your own.
#
# TENSORRT_ROOT (a CMake or an environment variable) is where NVIDIA's archive was unpacked.

if(NOT SPACH_TENSORRT MATCHES "^tensorrt(-rtx)?$")
  message(FATAL_ERROR "SPACH_TENSORRT is '${SPACH_TENSORRT}'; it is tensorrt or tensorrt-rtx.")
endif()

if(NOT TARGET CUDA::cudart)
  find_package(CUDAToolkit REQUIRED)
endif()

if(NOT TARGET Spach::TensorRT)
  if(SPACH_TENSORRT STREQUAL "tensorrt-rtx")
    set(_spach_names tensorrt_rtx)
    foreach(_spach_minor RANGE 0 20)
      list(APPEND _spach_names "tensorrt_rtx_1_${_spach_minor}") # as on Windows
    endforeach()
  else()
    set(_spach_names nvinfer nvinfer_11 nvinfer_10)
  endif()
  set(_spach_places "${TENSORRT_ROOT}" ENV TENSORRT_ROOT)
  # Two flavours may be installed side by side, so each has cache entries of its own.
  string(MAKE_C_IDENTIFIER "SPACH_${SPACH_TENSORRT}" _spach_prefix)
  find_path(${_spach_prefix}_INCLUDE_DIR NvInfer.h HINTS ${_spach_places} PATH_SUFFIXES include)
  find_library(${_spach_prefix}_LIBRARY NAMES ${_spach_names} HINTS ${_spach_places}
    PATH_SUFFIXES lib lib64)
  if(NOT ${_spach_prefix}_INCLUDE_DIR OR NOT ${_spach_prefix}_LIBRARY)
    message(FATAL_ERROR "${SPACH_TENSORRT} was not found: NvInfer.h and the library of it. Give "
      "-DTENSORRT_ROOT=DIR, the folder that NVIDIA's archive was unpacked to.")
  endif()
  add_library(Spach::TensorRT UNKNOWN IMPORTED)
  set_target_properties(Spach::TensorRT PROPERTIES
    IMPORTED_LOCATION "${${_spach_prefix}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${${_spach_prefix}_INCLUDE_DIR}")
endif()
