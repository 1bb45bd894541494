// SPDX-License-Identifier: Apache-2.0
// What the hypervisor says of domains, asked by Xen's libraries, which are loaded when they are wanted:
// libxenctrl, whose version is that of the hypervisor, else libxenmanage, which Xen has from 4.21 on and
// which does not say whether a domain is paused.

import Glibc
import Synchronization
package import SystemIO

/// What the hypervisor says of a domain that it knows.
package struct DomainState: Sendable, Hashable {
  /// It has shut down or suspended: none of its processors runs, and none will unless it is resumed.
  package var isShutDown = false
  /// It is being destroyed.
  package var isDying = false
  /// It is paused; nil: that cannot be found out.
  package var isPaused: Bool?

  /// A state from its parts.
  package init(isShutDown: Bool = false, isDying: Bool = false, isPaused: Bool? = nil) {
    self.isShutDown = isShutDown
    self.isDying = isDying
    self.isPaused = isPaused
  }

  /// Whether it runs, or may at any time.
  var runs: Bool { !isShutDown && !isDying }
}

/// Asks the hypervisor.
package protocol DomainStates: Sendable {
  /// The state of a domain; nil: the hypervisor does not know it. Throws when it cannot be asked: then
  /// nothing is known. Blocks.
  func state(of domain: Int) throws(IOError) -> DomainState?
}

/// The hypervisor of this host.
package final class XenDomains: DomainStates {
  private let library = Mutex<Library?>(nil)

  /// Asks when it is asked.
  package init() {}

  /// By whichever library there is.
  package func state(of domain: Int) throws(IOError) -> DomainState? {
    guard let domain = UInt32(exactly: domain) else { return nil }
    return try library.withLock { library throws(IOError) in
      if library == nil { library = try Library.load() }
      return try library?.state(domain)
    }
  }
}

/// A library that is loaded, and its connection to the hypervisor, which are kept.
// @unchecked: XenDomains has one caller at a time.
private struct Library: @unchecked Sendable {
  typealias Handle = OpaquePointer
  /// Source: xenctrl.h.
  typealias OpenControl =
    @convention(c) (OpaquePointer?, OpaquePointer?, UInt32) -> Handle?
  typealias GetInfoList =
    @convention(c) (Handle, UInt32, UInt32, UnsafeMutableRawPointer) -> Int32
  /// Source: xenmanage.h.
  typealias OpenManage = @convention(c) (OpaquePointer?, UInt32) -> Handle?
  typealias GetDomainInfo =
    @convention(c) (
      Handle, UInt32, UnsafeMutablePointer<UInt32>?, UnsafeMutablePointer<UInt64>?
    ) -> Int32

  private enum Calls {
    case control(GetInfoList)
    case manage(GetDomainInfo)
  }

  private let handle: Handle
  private let calls: Calls

  /// More than any version's record has: 112 bytes in Xen 4.17.
  private static let recordSize = 1024

  static func load() throws(IOError) -> Library {
    let what = "the state of domains"
    var names: [String] = []
    do throws(IOError) {
      let version = "/sys/hypervisor/version/"
      let major = try TextFile.read(version + "major").trimmingNewline
      let minor = try TextFile.read(version + "minor").trimmingNewline
      names.append("libxenctrl.so.\(major).\(minor)")
    } catch {
      // Not under Xen, or without sysfs.
      guard error.code == ENOENT else { throw error }
    }
    for name in names {
      guard let loaded = dlopen(name, RTLD_NOW | RTLD_LOCAL) else { continue }
      guard let open = dlsym(loaded, "xc_interface_open"),
        let list = dlsym(loaded, "xc_domain_getinfolist")
      else { throw IOError(ENOSYS, "ask for", what) }
      guard let handle = unsafeBitCast(open, to: OpenControl.self)(nil, nil, 0) else {
        throw IOError.last("ask for", what)
      }
      return Library(
        handle: handle, calls: .control(unsafeBitCast(list, to: GetInfoList.self)))
    }
    guard let loaded = dlopen("libxenmanage.so.1", RTLD_NOW | RTLD_LOCAL),
      let open = dlsym(loaded, "xenmanage_open"),
      let info = dlsym(loaded, "xenmanage_get_domain_info")
    else {
      throw IOError(
        ENOENT, "load", (names + ["libxenmanage.so.1"]).joined(separator: " or "))
    }
    guard let handle = unsafeBitCast(open, to: OpenManage.self)(nil, 0) else {
      throw IOError.last("ask for", what)
    }
    return Library(handle: handle, calls: .manage(unsafeBitCast(info, to: GetDomainInfo.self)))
  }

  func state(_ domain: UInt32) throws(IOError) -> DomainState? {
    switch calls {
    case .control(let list):
      // Answers the first domain from this number on. The head of the record is the same in all
      // versions: the number (16 bits) at 0, flags (32 bits) at 4. Source: xen/include/public/domctl.h,
      // struct xen_domctl_getdomaininfo, XEN_DOMINF_*.
      let record = UnsafeMutableRawPointer.allocate(
        byteCount: Library.recordSize, alignment: 16)
      defer { record.deallocate() }
      memset(record, 0, Library.recordSize)
      let count = list(handle, domain, 1, record)
      guard count >= 0 else { throw IOError.last("ask for the state of", "domain \(domain)") }
      guard count > 0, UInt32(record.load(as: UInt16.self)) == domain else { return nil }
      let flags = record.load(fromByteOffset: 4, as: UInt32.self)
      return DomainState(
        isShutDown: flags & 1 << 2 != 0, isDying: flags & 1 != 0, isPaused: flags & 1 << 3 != 0)
    case .manage(let info):
      // XENMANAGE_GETDOMSTATE_STATE_EXIST, _SHUTDOWN, _DYING, _DEAD.
      var bits: UInt32 = 0
      guard info(handle, domain, &bits, nil) == 0 else {
        if errno == ENOENT || errno == ESRCH { return nil }
        throw IOError.last("ask for the state of", "domain \(domain)")
      }
      guard bits & 1 != 0 else { return nil }
      return DomainState(isShutDown: bits & 2 != 0, isDying: bits & (4 | 8) != 0)
    }
  }
}
