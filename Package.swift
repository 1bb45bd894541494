// swift-tools-version: 6.2
// The rooms of docs/architecture.md, one target each. A target states here whom it may
// call; nothing else may be imported.
import Foundation
import PackageDescription

let swiftSettings: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
]

// While the rooms are being built a target is there when its folder is.
func exists(_ path: String) -> Bool {
  FileManager.default.fileExists(atPath: Context.packageDirectory + "/" + path)
}

func room(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
  .target(name: name, dependencies: dependencies, swiftSettings: swiftSettings)
}
func program(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
  .executableTarget(name: name, dependencies: dependencies, swiftSettings: swiftSettings)
}
func tests(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
  .testTarget(name: name, dependencies: dependencies, swiftSettings: swiftSettings)
}

let argumentParser = Target.Dependency.product(
  name: "ArgumentParser", package: "swift-argument-parser")
let logging = Target.Dependency.product(name: "Logging", package: "swift-log")
let lifecycle = Target.Dependency.product(
  name: "ServiceLifecycle", package: "swift-service-lifecycle")
let signals = Target.Dependency.product(
  name: "UnixSignals", package: "swift-service-lifecycle")
let toml = Target.Dependency.product(name: "TOMLKit", package: "TOMLKit")
let nio = Target.Dependency.product(name: "NIOCore", package: "swift-nio")
let nioPosix = Target.Dependency.product(name: "NIOPosix", package: "swift-nio")

let targets: [Target] = [
  .target(name: "CLinux"),
  .systemLibrary(name: "CXenStore", pkgConfig: "xenstore", providers: [.apt(["libxen-dev"])]),
  .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
  .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
  room("Posix", ["CLinux"]),
  room("XenStore", ["CXenStore", "Posix"]),
  room("ImageFormats", ["CZlib", "CZstd", "Posix"]),
  room("Target", ["Posix"]),
  room("WorkerLink", ["Posix"]),
  room("Worker", ["Target", "ImageFormats", "WorkerLink", "Posix"]),
  room(
    "Daemon",
    ["XenStore", "WorkerLink", "Posix", logging, lifecycle, signals, toml, nio, nioPosix]),
  program("cowd", ["Worker", argumentParser]),
  program("dmu-xend", ["Daemon", argumentParser]),
  program("dmu-xen", ["Daemon", argumentParser]),
  program("dscow_tool", ["ImageFormats", "Posix", argumentParser]),
  room("TestSupport", ["Posix"]),
  tests("PosixTests", ["Posix", "TestSupport"]),
  tests("XenStoreTests", ["XenStore", "TestSupport"]),
  tests("ImageFormatsTests", ["ImageFormats", "TestSupport"]),
  tests("TargetTests", ["Target", "TestSupport"]),
  tests("WorkerTests", ["Worker", "TestSupport"]),
  tests("DaemonTests", ["Daemon", "TestSupport"]),
  tests("IntegrationTests", ["Worker", "Daemon", "TestSupport"]),
].filter { exists(($0.type == .test ? "Tests/" : "Sources/") + $0.name) }

let used = Set(
  targets.flatMap(\.dependencies).compactMap {
    if case .productItem(_, let package, _, _) = $0 { return package }
    return nil
  })

let packages: [(String, Package.Dependency)] = [
  (
    "swift-argument-parser",
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2")
  ),
  ("swift-log", .package(url: "https://github.com/apple/swift-log", from: "1.16.2")),
  ("swift-nio", .package(url: "https://github.com/apple/swift-nio", from: "2.101.2")),
  (
    "swift-service-lifecycle",
    .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.13.0")
  ),
  ("TOMLKit", .package(url: "https://github.com/LebJe/TOMLKit", from: "0.6.0")),
]

let package = Package(
  name: "dmu-xen",
  dependencies: packages.filter { used.contains($0.0) }.map(\.1),
  targets: targets,
  cLanguageStandard: .gnu11,
  cxxLanguageStandard: .cxx17
)
