// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0
// The rooms of docs/architecture.md, one target each. A target states here whom it may
// call; nothing else may be imported. Warnings are errors.
import PackageDescription

let swiftSettings: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .treatAllWarnings(as: .error),
]

/// Whether this is the build that is installed, not one for tests.
let isProduct = Context.environment["DMU_PRODUCT"] != nil

/// What a release is linked with, by the toolchain's lld: no symbols for others, which would keep
/// functions that nobody calls; packed relocations, a tenth of the size, which need glibc 2.36. Without
/// libFoundation: it has some functions of FoundationEssentials, too, and lld would take the first.
let linkerSettings = linker(
  "--no-export-dynamic", "-z", "pack-relative-relocs",
  "--remap-inputs=*/libFoundation.a=/dev/null")
/// Of dmu-xend's file as it is installed (`make build`): without what NIO has for tests, and without the
/// parts of AsyncAlgorithms that ServiceLifecycle does not use. Neither is called, but the linker keeps
/// a type's metadata. Which objects need each other depends on how they are compiled: other builds,
/// those for tests, have all.
let unusedParts =
  !isProduct
  ? []
  : linker(
    ["NIOEmbedded.build/*", "NIO.build/*"].map(leftOut)
      + ["A", "B", "Chai", "Chun", "Co", "D", "E", "F", "I", "J", "Ma", "R", "S", "T", "Z"].map {
        leftOut("AsyncAlgorithms.build/Async\($0)*")
      } + ["Bo", "Co", "Deb", "Fl", "Unb"].map { leftOut("AsyncAlgorithms.build/\($0)*") })

func leftOut(_ objects: String) -> String { "--remap-inputs=*/\(objects).o=/dev/null" }
/// The same with the little of libstdc++ that is used: loading all of it takes a seventh of a start.
let staticCxx = linker("--remap-inputs=*/libstdc++.so=/dev/null", "-l:libstdc++.a")

func linker(_ options: String...) -> [LinkerSetting] { linker(options) }

func linker(_ options: [String]) -> [LinkerSetting] {
  let flags = ["-use-ld=lld"] + options.flatMap { ["-Xlinker", $0] }
  return [.unsafeFlags(flags, .when(configuration: .release))]
}

/// `path`: where it lies, if not in Sources/NAME.
func room(
  _ name: String, _ dependencies: [Target.Dependency] = [], path: String? = nil,
  _ more: [SwiftSetting] = []
) -> Target {
  .target(name: name, dependencies: dependencies, path: path, swiftSettings: swiftSettings + more)
}
/// The same, on the path of each request: installed without the checks of exclusive access at run time,
/// a third of its instructions. Builds for tests have them. See docs/decisions/exclusive-access.md.
func hotRoom(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
  let unchecked: [SwiftSetting] = [.unsafeFlags(["-enforce-exclusivity=unchecked"])]
  return .target(
    name: name, dependencies: dependencies,
    swiftSettings: swiftSettings + (isProduct ? unchecked : []))
}
/// The same, compiled for size: it waits, or is called once, more than it computes.
func smallRoom(
  _ name: String, _ dependencies: [Target.Dependency] = [], path: String? = nil,
  _ more: [SwiftSetting] = []
) -> Target {
  room(
    name, dependencies, path: path,
    more + [.unsafeFlags(["-Osize"], .when(configuration: .release))])
}
func program(
  _ name: String, _ dependencies: [Target.Dependency], path: String? = nil
) -> Target {
  .executableTarget(
    name: name, dependencies: dependencies, path: path, swiftSettings: swiftSettings)
}
/// A file that is each program of a room: `main` runs the one by whose name it is called.
func multiCall(_ name: String, _ room: String, _ more: [LinkerSetting] = []) -> Target {
  .executableTarget(
    name: name, dependencies: [.byName(name: room)], path: "Sources/main/\(name)",
    swiftSettings: swiftSettings, linkerSettings: linkerSettings + more)
}
func tests(
  _ name: String, _ dependencies: [Target.Dependency], _ more: [SwiftSetting] = []
) -> Target {
  .testTarget(
    name: name, dependencies: dependencies + support, swiftSettings: swiftSettings + more)
}
/// Of tests that wait for others more than they compute: what they test is optimized.
let waiting: [SwiftSetting] = [.unsafeFlags(["-Onone"], .when(configuration: .release))]
/// Of rooms that see the door to libxml2, and of tests that see into them.
let libxml2: [SwiftSetting] = [.unsafeFlags(["-Xcc", "-I/usr/include/libxml2"])]
/// What all that handles disks knows of.
let block: [Target.Dependency] = ["DiskModel", "BlockIO", "SystemIO"]
/// What tests have in common.
let support: [Target.Dependency] = ["TestSupport", "Fakes"]

let argumentParser = Target.Dependency.product(
  name: "ArgumentParser", package: "swift-argument-parser")
let logging = Target.Dependency.product(name: "Logging", package: "swift-log")
let lifecycle = Target.Dependency.product(
  name: "ServiceLifecycle", package: "swift-service-lifecycle")
let signals = Target.Dependency.product(name: "UnixSignals", package: "swift-service-lifecycle")
let toml = Target.Dependency.product(name: "TOMLKit", package: "TOMLKit")
let nio = Target.Dependency.product(name: "NIOCore", package: "swift-nio")
let nioHTTP = Target.Dependency.product(name: "NIOHTTP1", package: "swift-nio")
let nioPosix = Target.Dependency.product(name: "NIOPosix", package: "swift-nio")

let package = Package(
  name: "dmu-xen",
  products: [.library(name: "DMU", targets: ["DMU"])],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
    .package(url: "https://github.com/apple/swift-nio", from: "2.101.2"),
    .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.13.0"),
    .package(url: "https://github.com/LebJe/TOMLKit", from: "0.6.0"),
  ],
  targets: [
    .target(name: "CLinux"),
    .systemLibrary(name: "CXenStore", pkgConfig: "xenstore", providers: [.apt(["libxen-dev"])]),
    .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
    .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
    .target(name: "CPlugin"),
    // Loaded when they are wanted: by pkg-config they would be linked.
    .systemLibrary(name: "CDeviceMapper", providers: [.apt(["libdevmapper-dev"])]),
    .systemLibrary(name: "CLibXML2", providers: [.apt(["libxml2-dev"])]),
    .systemLibrary(name: "CSeccomp", providers: [.apt(["libseccomp-dev"])]),
    .target(name: "DMUProtocol"),
    // What a disk is, and the system's files, stores and block devices.
    room("DiskModel"),
    hotRoom("SystemIO", ["CLinux"]),
    hotRoom("BlockIO", ["SystemIO", "CLinux"]),
    smallRoom("LinuxBlock", ["BlockIO", "SystemIO", "CDeviceMapper", "CLinux"]),
    smallRoom("XenStore", ["CXenStore"]),
    smallRoom("XLConfiguration"),
    room("DMU", ["DMUProtocol", "SystemIO"]),
    // Formats and targets, which know of one another only what the model says, and the worker
    // between them.
    room("DiskFormats", ["CPlugin", "CZlib", "CZstd"] + block),
    hotRoom("Target", ["DMU"] + block),
    hotRoom("NBDServer", ["Target", "SystemIO"]),
    smallRoom("WorkerLink", ["SystemIO"]),
    room(
      "Worker",
      ["CSeccomp", "Target", "NBDServer", "DMU", "LinuxBlock", "DiskFormats", "WorkerLink"] + block),
    smallRoom("XMLText", ["CLibXML2", "SystemIO"], libxml2),
    room("ImageTool", ["XMLText", "DiskFormats", "BlockIO", "SystemIO"], libxml2),
    smallRoom(
      "Daemon",
      [
        "XenStore", "XLConfiguration", "XMLText", "WorkerLink", "LinuxBlock", "BlockIO", "SystemIO",
        logging, lifecycle, signals, toml, nio, nioPosix, nioHTTP,
      ], libxml2),
    smallRoom(
      "CowdArguments", ["Worker", "WorkerLink", "SystemIO", argumentParser], path: "Sources/cowd"),
    smallRoom(
      "DmuImgArguments", ["ImageTool", "DiskFormats", "SystemIO", argumentParser],
      path: "Sources/dmu-img"),
    smallRoom(
      "DscowToolArguments", ["DiskFormats", "SystemIO", argumentParser], path: "Sources/dscow_tool"),
    smallRoom(
      "DmuXendArguments", ["Daemon", "SystemIO", argumentParser], path: "Sources/dmu-xend"),
    smallRoom("DmuXenArguments", ["Daemon", "SystemIO", argumentParser], path: "Sources/dmu-xen"),
    smallRoom(
      "DmuXlArguments", ["XLConfiguration", "SystemIO", argumentParser], path: "Sources/dmu-xl"),
    // Two multi-call files are installed, cowd and dmu-xend. The build has a copy of them under each
    // name that they know.
    room("DiskPrograms", ["CowdArguments", "DmuImgArguments", "DscowToolArguments", "SystemIO"]),
    room("HostPrograms", ["DmuXendArguments", "DmuXenArguments", "DmuXlArguments", "SystemIO"]),
    multiCall("cowd", "DiskPrograms", staticCxx),
    multiCall("dmu-img", "DiskPrograms", staticCxx),
    multiCall("dscow_tool", "DiskPrograms", staticCxx),
    multiCall("dmu-xend", "HostPrograms", unusedParts),
    multiCall("dmu-xen", "HostPrograms", unusedParts),
    multiCall("dmu-xl", "HostPrograms", unusedParts),
    program("linear", ["DMU", "SystemIO"], path: "examples/linear"),
    // What is only for tests: nothing of it is installed.
    room("TestSupport", ["SystemIO"], path: "Tests/Support"),
    room("Fakes", ["TestSupport", "BlockIO", "SystemIO"], path: "Tests/Fakes"),
    .target(name: "CTrials", path: "Tests/CTrials"),
    room(
      "TargetTrials", ["CTrials", "DMU", "LinuxBlock", "Target"] + block + support,
      path: "Tests/Trials"),
    program(
      "kernel-exercise",
      ["LinuxBlock", "WorkerLink", "Target", "TargetTrials", "BlockIO", "SystemIO"],
      path: "Tests/KernelExercise"),
    program("played-worker", ["WorkerLink", "BlockIO", "SystemIO"], path: "Tests/PlayedWorker"),
    program("cage-trial", ["CTrials", "Worker", "SystemIO"], path: "Tests/CageTrial"),
    tests("SystemIOTests", ["BlockIO", "SystemIO"], waiting),
    tests("BlockIOTests", ["LinuxBlock", "BlockIO", "SystemIO"], waiting),
    tests("LinuxBlockTests", ["LinuxBlock", "SystemIO"], waiting),
    tests("XenStoreTests", ["XenStore"], waiting),
    tests("XLConfigurationTests", ["XLConfiguration"]),
    tests("DiskFormatsTests", ["DiskFormats"] + block),
    tests("ImageToolTests", ["ImageTool", "DiskFormats", "LinuxBlock"] + block, libxml2),
    tests("TargetTests", ["Target", "TargetTrials", "DMU"] + block),
    tests(
      "NBDServerTests", ["NBDServer", "Target", "TargetTrials", "BlockIO", "SystemIO"], waiting),
    tests(
      "WorkerTests",
      ["Worker", "Target", "LinuxBlock", "DiskFormats", "WorkerLink"] + block, waiting),
    tests(
      "DaemonTests",
      [
        "Daemon", "LinuxBlock", "DiskFormats", "WorkerLink", "XenStore", "BlockIO", "SystemIO",
        logging,
      ], waiting + libxml2),
    .testTarget(
      name: "SimulationTests",
      dependencies: [
        "Daemon", "LinuxBlock", "WorkerLink", "XenStore", "BlockIO", "SystemIO", logging,
      ] + support,
      path: "Tests/Simulation", swiftSettings: swiftSettings + libxml2),
  ],
  cLanguageStandard: .gnu11,
  cxxLanguageStandard: .cxx17
)
