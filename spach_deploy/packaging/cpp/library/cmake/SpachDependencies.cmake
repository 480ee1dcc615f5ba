# The targets Spach::TensorRT, CUDA::cudart and Threads::Threads. Define any yourself beforehand to
# bring your own.
#
# TENSORRT_ROOT (a CMake or an environment variable, one folder or several) is where NVIDIA's archive
# was unpacked, or the site-packages folder, or the folder in it, where pip installed TensorRT: such a
# wheel has the library and no headers, so these come from an archive. Without it, the wheel of the
# Python that is found is tried last.

if(NOT SPACH_TENSORRT MATCHES "^tensorrt(-rtx)?$")
  message(FATAL_ERROR "SPACH_TENSORRT is '${SPACH_TENSORRT}'; it is tensorrt or tensorrt-rtx.")
endif()

if(NOT TARGET CUDA::cudart)
  find_package(CUDAToolkit REQUIRED)
endif()

if(NOT TARGET Spach::TensorRT)
  # Wheels have libraries under their full names alone, without the link that compilers look for.
  if(SPACH_TENSORRT STREQUAL "tensorrt-rtx")
    set(_spach_names tensorrt_rtx)
    foreach(_spach_minor RANGE 0 20)
      list(APPEND _spach_names "tensorrt_rtx_1_${_spach_minor}") # as on Windows
    endforeach()
    list(APPEND _spach_names libtensorrt_rtx.so.1)
    set(_spach_wheel tensorrt_rtx_libs)
  else()
    set(_spach_names nvinfer nvinfer_11 nvinfer_10 libnvinfer.so.11 libnvinfer.so.10)
    set(_spach_wheel tensorrt_libs)
  endif()
  set(_spach_places ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT})
  # Two flavours may be installed side by side, so each has cache entries of its own.
  string(MAKE_C_IDENTIFIER "SPACH_${SPACH_TENSORRT}" _spach_prefix)
  find_path(${_spach_prefix}_INCLUDE_DIR NvInfer.h HINTS ${_spach_places} PATH_SUFFIXES include)
  find_library(${_spach_prefix}_LIBRARY NAMES ${_spach_names} HINTS ${_spach_places}
    PATH_SUFFIXES lib lib64 ${_spach_wheel})
  if(NOT ${_spach_prefix}_LIBRARY AND NOT CMAKE_CROSSCOMPILING)
    find_program(SPACH_PYTHON NAMES python3 python
      DOC "Python that may have TensorRT installed, from its wheel")
    if(SPACH_PYTHON)
      execute_process(COMMAND "${SPACH_PYTHON}" -c
        "import importlib.util as u; print(u.find_spec('${_spach_wheel}').submodule_search_locations[0])"
        OUTPUT_VARIABLE _spach_place ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
      find_library(${_spach_prefix}_LIBRARY NAMES ${_spach_names} HINTS "${_spach_place}")
    endif()
  endif()
  if(NOT ${_spach_prefix}_INCLUDE_DIR OR NOT ${_spach_prefix}_LIBRARY)
    set(_spach_missing "")
    if(NOT ${_spach_prefix}_INCLUDE_DIR)
      list(APPEND _spach_missing "NvInfer.h (pip's packages do not have it)")
    endif()
    if(NOT ${_spach_prefix}_LIBRARY)
      list(APPEND _spach_missing "the library of it")
    endif()
    list(JOIN _spach_missing " and " _spach_missing)
    message(FATAL_ERROR "${SPACH_TENSORRT} was not found: ${_spach_missing}. Give "
      "-DTENSORRT_ROOT=DIR, the folder that NVIDIA's archive was unpacked to; or two folders, "
      "separated by a semicolon, where the library is pip's.")
  endif()
  add_library(Spach::TensorRT UNKNOWN IMPORTED)
  set_target_properties(Spach::TensorRT PROPERTIES
    IMPORTED_LOCATION "${${_spach_prefix}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${${_spach_prefix}_INCLUDE_DIR}")
endif()

if(NOT TARGET Threads::Threads)
  find_package(Threads REQUIRED)
endif()
