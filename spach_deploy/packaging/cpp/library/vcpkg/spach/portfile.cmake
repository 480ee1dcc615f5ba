# vcpkg install spach --overlay-ports=engine-cpp/vcpkg, with TENSORRT_ROOT in the environment:
# TensorRT and the CUDA runtime come from NVIDIA. vcpkg hides variables that it does not know, so name
# it: VCPKG_KEEP_ENV_VARS=TENSORRT_ROOT.
get_filename_component(SOURCE_PATH "${CURRENT_PORT_DIR}/../.." ABSOLUTE)

vcpkg_check_features(OUT_FEATURE_OPTIONS FEATURE_OPTIONS FEATURES tools SPACH_TOOLS)
vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS ${FEATURE_OPTIONS} -DSPACH_INSTALL=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME Spach CONFIG_PATH lib/cmake/Spach)
vcpkg_fixup_pkgconfig()
if("tools" IN_LIST FEATURES)
  vcpkg_copy_tools(TOOL_NAMES spach_classify spach_self_test spach_benchmark AUTO_CLEAN)
endif()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
